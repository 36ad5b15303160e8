"""The nouns that every part shares: Request, Image, Failure, Unit, UnitReport. Plain values; neither torch nor ray."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

RequestKey = tuple[int, int]
"""`(position, image_index)`: what a run accounts for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One image to make: a row of the input (at `position`) and which of its `images_per_prompt` (`image_index`)."""

    position: int
    """The row's place in the whole input, from 0."""
    image_index: int
    id: str
    """The user's label, passed through; not necessarily unique."""
    prompt: str
    negative_prompt: str | None
    """None: the model's learned unconditional text."""
    seed: int
    """In [0, 2**63)."""
    cfg: tuple[float, ...]
    """Guidance strength of each of the schedule's K scales; 1 means no guidance."""
    tau: tuple[float, ...]
    """Sampling temperature of each of the K scales, > 0."""
    top_k: int
    """0: off. 1: arg max. 2 or more: no effect on binary codes."""
    top_p: float
    """In [0, 1]; 0: off."""
    aspect_ratio: float
    """Height / width, as asked."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The user's own columns, by their names in the input."""
    must_be_base: bool = False
    """Made under `base`, whatever a policy that decides image by image says, and not audited."""

    @property
    def key(self) -> RequestKey:
        """Unique in a run, as `id` need not be."""
        return (self.position, self.image_index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What SkipVAR looks at after the decision scale (FORWARD.md section 9), for one image."""

    sobel_change: float
    """Mean absolute change of the Sobel magnitude between the last two scales' decoded images."""
    fft_high_frequency_ratio: float
    """Share of the spectrum's amplitude beyond 0.4 of the half side, in [0, 1]."""

    @property
    def numbers(self) -> tuple[float, float]:
        """In the order of policy files."""
        return (self.sobel_change, self.fft_high_frequency_ratio)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What came of making one image under every strategy from one prefix."""

    ssim: Mapping[str, float]
    """Of each strategy's image to the one of `base`; so is `psnr`."""
    psnr: Mapping[str, float | None] = field(default_factory=dict)
    """In dB; None where no pixel differs."""
    lpips: Mapping[str, float] | None = None
    """0 where no pixel differs; None where LPIPS cannot be computed."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Of each strategy: its share of text, prefix, its own scales (whoever shared them) and decoding, without probe."""
    probes: Mapping[int, Probe]
    """By the scale whose grid the probe was decoded at; so is `probe_seconds`."""
    probe_seconds: Mapping[int, float] = field(default_factory=dict)
    """What taking it cost."""
    latents: Sequence[float] = ()
    """The code sum at the decision scale as a small picture (`skipvar.skip.probe.small_latents`)."""
    early_latents: Sequence[float] = ()
    """The same a scale earlier: tried, and used by no policy."""
    latent_seconds: float = 0.0
    """What taking one of the two cost."""
    pixels: "Mapping[str, np.ndarray]" = field(default_factory=dict)
    """Of each strategy's image, as `Image.pixels`; empty unless they are kept, which no dataset does."""
    prompt: str = ""
    """Of the row that the trial is read from, as `group`. Images of one prompt share its difficulty."""
    group: str = ""
    """What kind of prompt it is: reported by, never fitted on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A finished request."""

    request: Request
    pixels: "np.ndarray"
    """`(height, width, 3)` uint8, RGB."""
    strategy: str
    """Name of the strategy that it was made under."""
    probe: Probe | None
    """None where none was decoded: a fixed policy, one that looks at latents, a schedule without a decision."""
    strategy_scores: Mapping[str, float] | None
    """The policy's score of each strategy (a probability for logistic policies); None where it has none."""
    scales_run: int
    cost_share: float
    """Token-forwards run over those of `base`, in (0, 1]."""
    engine_seconds: float
    """Share of the engine's time: each batch's seconds divided by its images."""
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    """The same by phase: text, prefix, probe, suffix, decode."""
    audit_ssim: float | None = None
    """Similarity to what `base` makes of the request; None where it was not audited."""
    base_pixels: "np.ndarray | None" = None
    """What `base` makes of it, where that was made for an audit; as `pixels`."""
    base_seconds: float | None = None
    """What `base` takes of the engine's time, where it was audited; as `engine_seconds`."""
    trial: Trial | None = None
    """In a run whose policy is `trials`; the pixels are then those of `base`."""

    def save(self, path: "str | Path") -> None:
        """Write the picture to a file, in the format of the name's ending (`.png` keeps every bit)."""
        from PIL import Image as Picture

        Picture.fromarray(self.pixels).save(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A request that ended without an image."""

    position: int
    image_index: int
    id: str
    prompt: str
    seed: int | None
    error_class: str
    message: str
    attempts: int = 1
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> RequestKey:
        """That of the request that failed."""
        return (self.position, self.image_index)

    @classmethod
    def of(cls, request: Request, error: Exception) -> "Failure":
        """The failure of a request that could be read but not made."""
        return cls(
            position=request.position,
            image_index=request.image_index,
            id=request.id,
            prompt=request.prompt,
            seed=request.seed,
            error_class=type(error).__name__,
            message=str(error),
            columns=request.columns,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSlice:
    """A range of rows of one Parquet file of the input."""

    uri: str
    first_row: int
    num_rows: int
    size: int
    """The whole file's, in bytes, when the run was planned."""
    footer_checksum: int
    """CRC-32 of the file's footer then."""
    is_part: bool = False
    """It is text input in its normal form (`skipvar.shards.textinput`), not a file of the user's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A contiguous range of prompts: the grain of scheduling, commit and resume."""

    index: int
    first_position: int
    num_rows: int
    """Input rows (prompts), not requests."""
    slices: Sequence[FileSlice]
    only: frozenset[RequestKey] | None = None
    """Make these requests alone (`retry_errors`); None: all."""
    retry: int = 0
    """0: the unit itself. R > 0: its R-th retry, published beside it as `data/unit-N.retry-R.parquet`."""

    def keys(self, images_per_prompt: int) -> list[RequestKey]:
        """The requests that the unit must account for, in order."""
        positions = range(self.first_position, self.first_position + self.num_rows)
        keys = itertools.product(positions, range(images_per_prompt))
        return [key for key in keys if self.only is None or key in self.only]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitReport:
    """What a replica tells the driver of a finished unit: small, whatever the unit's size."""

    unit: int
    num_images: int
    num_failures: int
    same_content: bool
    """False: another worker had published the unit with other content than was made here."""
    strategies: Mapping[str, int]
    """Images made under each strategy."""
    audit_scores: tuple[float, ...] = ()
    """SSIM to `base` of the images that were audited."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a listing."""

    name: str
    """Relative to the storage's uri, with `/` between folders."""
    size: int
    version: str
    """Changes when the object does: the ETag on S3, the modification time in nanoseconds locally."""
