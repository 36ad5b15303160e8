"""The engine against its slow twin, timed."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from skipvar.config import RunConfig
from skipvar.engine.engine import Engine
from skipvar.engine.resolved import resolve
from skipvar.errors import InputError
from skipvar.local import build_local_engine
from skipvar.shards.cache import StoredFiles
from skipvar.shards.prompts import plan_input, read_unit
from skipvar.types import Request

Way = Callable[[Sequence[Request]], None]


def measure_engine(
    config: RunConfig, *, num_images: int, num_rounds: int, show: Callable[[str], None]
) -> dict[str, Any]:
    """Images a second of three ways to make the same prompts, in one process, one after the other in every round.

    `twin`: one image at a time, all scales guided, no grouping. `batched`: the engine, all scales guided. `engine`: the
    engine under the configuration's policy. Medians over the rounds, so that a busy moment of the machine matters less.
    """
    from skipvar.engine.twin import generate_one

    files = StoredFiles(config.storage)
    resolved, plain = resolve(config, files), replace(config, policy="fixed:base")
    engine = build_local_engine(config, resolved)
    batched = build_local_engine(plain, resolve(plain, files), engine.pipeline)
    plan = plan_input(config, resolved.num_scales)
    items = (item for index in range(plan.num_units) for item in read_unit(plan.unit(index), plan.spec))
    requests = [item for item, _ in zip(items, range(num_images), strict=False) if isinstance(item, Request)]
    if not requests:
        raise InputError(f"input.path: none of the first {num_images} rows can be used; give prompts that can be made.")

    def twin(batch: Sequence[Request]) -> None:
        for request in batch:
            generate_one(engine.pipeline, request, "base", engine.sampler.rules)

    ways: dict[str, Way] = {"twin": twin, "batched": partial(_drain, batched), "engine": partial(_drain, engine)}
    seconds, cpu_seconds = _time_in_turns(ways, requests, num_rounds, show)
    rates = {name: len(requests) / statistics.median(found) for name, found in seconds.items()}
    ratio, ratio_batched = rates["engine"] / rates["twin"], rates["batched"] / rates["twin"]
    show(f"engine under {resolved.policy.name} against the slow twin: {ratio:.2f} times as fast")
    show(f"of that by batches alone (every image in full): {ratio_batched:.2f}")
    return {
        "images_per_second": {name: round(rate, 3) for name, rate in rates.items()},
        "ratio": round(ratio, 3),
        "ratio_batched": round(ratio_batched, 3),
        "ratio_cpu_seconds": round(cpu_seconds["twin"] / cpu_seconds["engine"], 3),
        "images": len(requests),
        "rounds": num_rounds,
        "suffix_fill": engine.statistics.to_dict()["suffix_fill"],
        "model": resolved.model.name,
        "policy": resolved.policy.name,
        "device": resolved.device,
        "dtype": resolved.dtype,
        "processor": engine.report.processor,
        "torch": engine.report.torch,
        "batch_size": dict(engine.report.batch_size),
    }


def _drain(engine: Engine, requests: Sequence[Request]) -> None:
    engine.submit(requests)
    engine.drain()


def _time_in_turns(
    ways: Mapping[str, Way], requests: Sequence[Request], num_rounds: int, show: Callable[[str], None]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """By way: the seconds of every round, and the processor's seconds of all (what other processes take of the machine
    is not in those)."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu_seconds = dict.fromkeys(ways, 0.0)
    for way in ways.values():
        way(requests[:1])  # what is set up once is not timed
    for number in range(num_rounds):
        for name, way in ways.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            way(requests)
            seconds[name].append(time.perf_counter() - started)
            cpu_seconds[name] += time.process_time() - cpu_started
        speeds = ", ".join(f"{name} {len(requests) / seconds[name][-1]:.2f} images/s" for name in ways)
        show(f"round {number + 1} of {num_rounds}: {speeds}")
    return seconds, cpu_seconds
