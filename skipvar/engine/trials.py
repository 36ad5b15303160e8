"""Trials: one image made under several strategies from one prefix, the raw material of calibration."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from skipvar.engine.memory import image_costs, plan_memory
from skipvar.engine.runner import Runner
from skipvar.engine.sampler import Sampler, SamplingRules
from skipvar.model.pipeline import Pipeline
from skipvar.skip.strategy import STRATEGY_NAMES, default_decision_scale, make_strategy
from skipvar.types import Probe, Request


@dataclass(frozen=True)
class Trial:
    """An image made under several strategies, and the probe at each of some grids."""

    request: Request
    pixels: dict[str, np.ndarray]
    """By strategy: `(H, W, 3)` uint8."""
    probes: dict[int, Probe]
    """By the scale whose grid the probe was decoded at."""


def make_trials(
    pipeline: Pipeline,
    rules: SamplingRules,
    requests: Sequence[Request],
    grid_scales: Sequence[int],
    batch_size: int,
    strategies: Sequence[str] = STRATEGY_NAMES,
) -> Iterator[Trial]:
    """Makes trials of requests that share one aspect ratio under these strategies, a batch at a time.

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
        yield from _make_batch(runner, requests[start : start + batch_size], grid_scales, decision_scale, strategies)


def _make_batch(
    runner: Runner,
    requests: Sequence[Request],
    grid_scales: Sequence[int],
    decision_scale: int,
    strategies: Sequence[str],
) -> Iterator[Trial]:
    images = [runner.sampler.start_image(request) for request in requests]
    working = runner.run_prefix(images, decision_scale, len(images))
    probes = {scale: runner.probe(working, decision_scale, scale) for scale in grid_scales}
    runner.hold(working, range(len(images)))
    at_decision = [image.snapshot() for image in images]
    pixels = {}
    for name in strategies:
        strategy = make_strategy(name, images[0].schedule.num_scales)
        for image, snapshot in zip(images, at_decision, strict=True):
            image.restore(snapshot)
        if strategy.num_scales_run > decision_scale + 1:
            runner.run_suffix(images, decision_scale, strategy.modes, len(images))
        pixels[name] = runner.decode(images)
    for image in images:
        runner.release(image)
    for index, request in enumerate(requests):
        yield Trial(
            request,
            {name: values[index] for name, values in pixels.items()},
            {scale: values[index] for scale, values in probes.items()},
        )
