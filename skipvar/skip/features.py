"""What a policy decides by: the paper's two numbers, or a small picture of the code sum that needs no decoding."""

from collections.abc import Sequence
from dataclasses import dataclass

from skipvar.types import Trial

LATENT_CELLS = 4
"""The code sum's small picture has so many cells a side; coarser ones are means of these."""
LATENT_SIDES = (1, 2, 4)
"""Cells a side that calibration tries."""
LATENT_MEANS = "latent_means"
"""The small picture, as policy files name it."""
FREQUENCIES = ("sobel_change", "fft_high_frequency_ratio")
"""The two numbers of a decoded probe, as policy files name them."""


@dataclass(frozen=True)
class DecodedProbe:
    """Sobel change and FFT high-frequency ratio (FORWARD.md section 9)."""

    grid_scale: int
    """The code sums are decoded at the latent grid of this scale of the schedule."""

    def __str__(self) -> str:
        return f"decoded at scale {self.grid_scale}"

    def numbers(self, trial: Trial) -> tuple[float, ...]:
        """What a policy with this probe decides a trial's image by."""
        return trial.probes[self.grid_scale].numbers

    def seconds(self, trial: Trial) -> float:
        """What taking it cost in a trial."""
        return trial.probe_seconds[self.grid_scale]


@dataclass(frozen=True)
class LatentProbe:
    """The running code sum at the decision scale, each channel averaged over `side` x `side` cells."""

    side: int
    """One of `LATENT_SIDES`."""

    def __str__(self) -> str:
        return f"latents {self.side}x{self.side}"

    def numbers(self, trial: Trial) -> tuple[float, ...]:
        """What a policy with this probe decides a trial's image by."""
        return self.pick(trial.latents)

    def seconds(self, trial: Trial) -> float:
        """What taking it cost in a trial."""
        return trial.latent_seconds

    def pick(self, latents: Sequence[float]) -> tuple[float, ...]:
        """Channel by channel the means of its cells, row by row; from those of `LATENT_CELLS` cells a side."""
        block = LATENT_CELLS // self.side
        if block == 1:
            return tuple(latents)
        corners = [
            start + top * LATENT_CELLS + left
            for start in range(0, len(latents), LATENT_CELLS**2)
            for top in range(0, LATENT_CELLS, block)
            for left in range(0, LATENT_CELLS, block)
        ]
        inside = [row * LATENT_CELLS + column for row in range(block) for column in range(block)]
        return tuple(sum(latents[corner + place] for place in inside) / block**2 for corner in corners)


ProbeRule = DecodedProbe | LatentProbe
