"""Trials: one image made under several strategies from one prefix, the raw material of calibration.

Strategies that agree on a scale and all before it share that scale: the suffixes are a tree, grown in the
working cache.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from skipvar.engine.batcher import Batch, Limits
from skipvar.engine.engine import Engine, Finished
from skipvar.engine.resolved import DeviceReport
from skipvar.engine.runner import Runner, Suffix
from skipvar.engine.sampler import WorkingBatch
from skipvar.engine.state import ImageState
from skipvar.skip.policy import Policy
from skipvar.skip.strategy import STRATEGY_NAMES, make_strategy
from skipvar.types import Probe, Trial

FIRST_GRID_SCALE = 3
"""Coarser grids show too little; finer ones than the decision scale's neighbour cost as much as the image."""

Comparison = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Two `(B, H, W, 3)` uint8 -> `(B,)`."""


@dataclass(frozen=True)
class TrialRule:
    """How a trial's images are compared with `base`, and which are made."""

    ssim: Comparison
    psnr: Comparison
    """In dB; infinite where no pixel differs."""
    lpips: Comparison | None = None
    strategies: Sequence[str] = STRATEGY_NAMES
    """`base` among them."""
    grid_scales: Sequence[int] | None = None
    """Scales at whose grids the probe is taken; None: from `FIRST_GRID_SCALE` to the one after the decision scale."""
    keeps_pixels: bool = False
    """Whether the trial holds them all."""


class TrialEngine(Engine):
    """An engine whose images are those of `base` and carry a `Trial` each. It has no buckets: a trial is one batch."""

    def __init__(
        self, runner: Runner, policy: Policy, limits: Limits, report: DeviceReport, trial_rule: TrialRule
    ) -> None:
        super().__init__(runner, policy, limits, report)
        self._rule = trial_rule
        self._grid_scales = trial_rule.grid_scales or range(FIRST_GRID_SCALE, self._decision_scale + 2)

    def _run(self, batch: Batch[ImageState]) -> list[ImageState]:
        images, decision_scale = batch.items, self._decision_scale
        start = time.perf_counter()
        self._encode_text(images)
        with self._timed("prefix", images):
            working = self._runner.run_prefix(images, decision_scale, batch.limit, goes_on=True)
        prefix_seconds = (time.perf_counter() - start) / len(images)
        with self._timed("probe", images):
            probes, probe_seconds = self._take_probes(working)
            looked = time.perf_counter()
            latents, early_latents = (self._runner.latents(working, decision_scale - back) for back in (0, 1))
            latent_seconds = (time.perf_counter() - looked) / 2 / len(images)
        with self._timed("suffix", images):
            strategies = [make_strategy(name, images[0].schedule.num_scales) for name in self._rule.strategies]
            suffixes = self._runner.run_suffixes(working, strategies)
        for place, image in enumerate(images):
            compared = self._compare(image, place, suffixes, prefix_seconds)
            if compared is None:
                image.is_finite = False
                continue
            pixels, scores = compared
            trial = Trial(
                **scores,
                probes={grid: values[place] for grid, values in probes.items()},
                probe_seconds=probe_seconds,
                latents=latents[place],
                early_latents=early_latents[place],
                latent_seconds=latent_seconds,
                pixels=pixels if self._rule.keeps_pixels else {},
            )
            image.strategy = make_strategy("base", image.schedule.num_scales)
            image.made = replace(image.finish(pixels["base"]), trial=trial)
        self._count(self.statistics.prefix, batch)
        return images

    def _settle(self, images: Sequence[ImageState]) -> list[Finished]:
        for image in images:
            if not image.is_finite:
                self._fail_as_unfinite(image, "logits or pixels")
        made: list[Finished] = [image.made for image in images if image.made is not None]
        self.statistics.images += len(made)
        return made

    def _take_probes(self, working: WorkingBatch) -> tuple[dict[int, list[Probe]], dict[int, float]]:
        """Every image's probe at each grid that is tried, and the seconds that an image's took."""
        probes, probe_seconds = {}, {}
        for grid in self._grid_scales:
            start = time.perf_counter()
            probes[grid] = self._runner.probe(working, self._decision_scale, grid)
            probe_seconds[grid] = (time.perf_counter() - start) / len(probes[grid])
        return probes, probe_seconds

    def _compare(
        self, image: ImageState, place: int, suffixes: Mapping[str, Suffix], prefix_seconds: float
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Pixels by strategy, and what compares them with those of `base`; None where something is not finite."""
        start = time.perf_counter()
        with self._timed("decode", [image]):
            decoded, is_finite = self._runner.decode_sums([suffix.code_sum[place] for suffix in suffixes.values()])
        decode_seconds = (time.perf_counter() - start) / len(suffixes)
        if not all(is_finite) or not all(suffix.is_finite[place] for suffix in suffixes.values()):
            return None
        pixels = dict(zip(suffixes, decoded, strict=True))
        others = [name for name in self._rule.strategies if name != "base"]
        mine = np.stack([pixels[name] for name in others])
        base = np.broadcast_to(pixels["base"], mine.shape)
        with self._timed("compare", [image]):
            ssim, psnr = self._rule.ssim(mine, base).tolist(), self._rule.psnr(mine, base).tolist()
            lpips = None if self._rule.lpips is None else self._rule.lpips(mine, base).tolist()
        share = prefix_seconds + decode_seconds
        num_images = len(suffixes["base"].is_finite)
        scores = {
            "ssim": {"base": 1.0, **dict(zip(others, ssim, strict=True))},
            "psnr": {"base": None} | {n: v if np.isfinite(v) else None for n, v in zip(others, psnr, strict=True)},
            "lpips": None if lpips is None else {"base": 0.0, **dict(zip(others, lpips, strict=True))},
            "seconds": {name: share + suffixes[name].seconds / num_images for name in self._rule.strategies},
        }
        return pixels, scores
