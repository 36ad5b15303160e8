"""Trials: one image made under several strategies from one prefix, the raw material of calibration.

Strategies that agree on a scale and all before it share that scale: the suffixes are a tree, grown in the
working cache.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from skipvar.engine.batcher import Batch, Limits
from skipvar.engine.engine import Engine, Finished, Lack, within_memory
from skipvar.engine.memory import image_costs, plan_memory
from skipvar.engine.resolved import DeviceReport
from skipvar.engine.runner import Runner, Suffix
from skipvar.engine.sampler import Sampler, SamplingRules, WorkingBatch
from skipvar.engine.state import ImageState
from skipvar.model.pipeline import Pipeline
from skipvar.skip.policy import Policy
from skipvar.skip.strategy import STRATEGY_NAMES, Strategy, default_decision_scale, make_strategy
from skipvar.types import Probe, Request, Trial

FIRST_GRID_SCALE = 3
"""Coarser grids show too little; finer ones than the decision scale's neighbour cost as much as the image."""

Comparison = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Two `(B, H, W, 3)` uint8 -> `(B,)`."""


@dataclass(frozen=True)
class TrialRule:
    """How a trial's images are compared with `base`."""

    ssim: Comparison
    psnr: Comparison
    """In dB; infinite where no pixel differs."""
    lpips: Comparison | None = None


@dataclass(frozen=True)
class TrialImages:
    """An image made under several strategies, and what can be looked at after its decision scale."""

    request: Request
    pixels: dict[str, np.ndarray]
    """By strategy: `(H, W, 3)` uint8."""
    probes: dict[int, Probe]
    """By the scale whose grid the probe was decoded at."""
    latents: Sequence[float]
    """The code sum as a small picture."""


class TrialEngine(Engine):
    """An engine whose images are those of `base` and carry a `Trial` each. It has no buckets: a trial is one batch."""

    def __init__(
        self, runner: Runner, policy: Policy, limits: Limits, report: DeviceReport, trial_rule: TrialRule
    ) -> None:
        super().__init__(runner, policy, limits, report)
        self._rule = trial_rule

    def _run_batch(self, batch: Batch[ImageState]) -> list[Finished]:
        before = [image.snapshot() for image in batch.items]
        done = within_memory(lambda: self._make_trials(batch))
        if isinstance(done, Lack):
            self._retreat(batch, before, done)
            return []
        made, unfinite = done
        for image in unfinite:  # only now: a batch that lacks memory runs again
            self._fail_as_unfinite(image, "logits or pixels")
        self._count(self.statistics.prefix, batch)
        self.statistics.images += len(made)
        return made

    def _make_trials(self, batch: Batch[ImageState]) -> tuple[list[Finished], list[ImageState]]:
        """Everything of a batch's trials, and its images with a number that is none."""
        images, decision_scale = batch.items, self._decision_scale
        start = time.perf_counter()
        with self._timed("text", images):
            for image in images:
                self.sampler.encode_text(image)
        with self._timed("prefix", images):
            working = self._runner.run_prefix(images, decision_scale, batch.limit, goes_on=True)
        prefix_seconds = time.perf_counter() - start
        with self._timed("probe", images):
            probes, probe_seconds = self._take_probes(working)
            looked = time.perf_counter()
            latents, early_latents = (self._runner.latents(working, decision_scale - back) for back in (0, 1))
            latent_seconds = (time.perf_counter() - looked) / 2 / len(images)
        with self._timed("suffix", images):
            suffixes = self._runner.run_suffixes(working, _strategies(STRATEGY_NAMES, images[0]))
        found: list[Finished] = []
        unfinite: list[ImageState] = []
        for place, image in enumerate(images):
            trial = self._finish_trial(image, place, suffixes, prefix_seconds / len(images))
            if trial is None:
                unfinite.append(image)
                continue
            pixels, scores = trial
            image.strategy = make_strategy("base", image.schedule.num_scales)
            trial_of = Trial(
                **scores,
                probes={grid: values[place] for grid, values in probes.items()},
                probe_seconds=probe_seconds,
                latents=latents[place],
                early_latents=early_latents[place],
                latent_seconds=latent_seconds,
            )
            found.append(replace(image.finish(pixels), trial=trial_of))
        return found, unfinite

    def _take_probes(self, working: WorkingBatch) -> tuple[dict[int, list[Probe]], dict[int, float]]:
        """Every image's probe at each grid that is tried, and the seconds that an image's took."""
        probes, probe_seconds = {}, {}
        for grid in range(FIRST_GRID_SCALE, self._decision_scale + 2):
            start = time.perf_counter()
            probes[grid] = self._runner.probe(working, self._decision_scale, grid)
            probe_seconds[grid] = (time.perf_counter() - start) / len(probes[grid])
        return probes, probe_seconds

    def _finish_trial(
        self, image: ImageState, place: int, suffixes: Mapping[str, Suffix], prefix_seconds: float
    ) -> tuple[np.ndarray, dict[str, Any]] | None:
        """The pixels of `base`, and what compares every strategy with them; None where something is not finite."""
        start = time.perf_counter()
        with self._timed("decode", [image]):
            decoded, is_finite = self._runner.decode_sums([suffix.code_sum[place] for suffix in suffixes.values()])
        decode_seconds = (time.perf_counter() - start) / len(suffixes)
        if not all(is_finite) or not all(suffix.is_finite[place] for suffix in suffixes.values()):
            return None
        pixels = dict(zip(suffixes, decoded, strict=True))
        others = [name for name in STRATEGY_NAMES if name != "base"]
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
            "seconds": {name: share + suffixes[name].seconds / num_images for name in STRATEGY_NAMES},
        }
        return pixels["base"], scores


def make_trials(
    pipeline: Pipeline,
    rules: SamplingRules,
    requests: Sequence[Request],
    grid_scales: Sequence[int],
    batch_size: int,
    strategies: Sequence[str] = STRATEGY_NAMES,
) -> Iterator[TrialImages]:
    """Makes trials of requests that share one aspect ratio under these strategies, a batch at a time, with all pixels.

    Raises `ValueError` where the schedule is too short for a decision.
    """
    if not requests:
        return
    schedule = pipeline.schedule(requests[0].aspect_ratio, rules.size)
    decision_scale = default_decision_scale(schedule.num_scales)
    if decision_scale is None:
        raise ValueError(f"{schedule.num_scales} scales are too few to skip any")
    costs = image_costs(
        pipeline.config, (schedule,), pipeline.dtype.itemsize, decision_scale=decision_scale, strategies=strategies
    )
    plan = plan_memory(
        costs, device=pipeline.device.type, batch_size=batch_size, pool_images=batch_size, free_bytes=None
    )
    runner = Runner(Sampler(pipeline, rules), plan, slot_tokens=costs.prefix_tokens)
    for start in range(0, len(requests), batch_size):
        some = requests[start : start + batch_size]
        images = [runner.sampler.start_image(request) for request in some]
        working = runner.run_prefix(images, decision_scale, len(images), goes_on=True)
        probes = {scale: runner.probe(working, decision_scale, scale) for scale in grid_scales}
        latents = runner.latents(working, decision_scale)
        suffixes = runner.run_suffixes(working, _strategies(strategies, images[0]))
        decoded = {name: runner.decode_sums(list(suffix.code_sum))[0] for name, suffix in suffixes.items()}
        for place, request in enumerate(some):
            pixels = {name: decoded[name][place] for name in strategies}
            of_image = {scale: values[place] for scale, values in probes.items()}
            yield TrialImages(request, pixels, of_image, latents[place])


def _strategies(names: Sequence[str], image: ImageState) -> list[Strategy]:
    return [make_strategy(name, image.schedule.num_scales) for name in names]
