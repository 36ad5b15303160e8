"""Measurements behind jobs/bench.py: the engine against its slow twin, and the driver's memory while it plans."""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from skipvar.config import InputConfig, RunConfig
from skipvar.engine.engine import Engine
from skipvar.engine.resolved import resolve
from skipvar.errors import InputError
from skipvar.local import build_local_engine
from skipvar.shards.cache import StoredFiles
from skipvar.shards.prompts import plan_input, read_unit
from skipvar.types import Request

CHUNK_ROWS = 1_000_000

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


def write_inputs(folder: Path, num_rows: int) -> list[Path]:
    """A Parquet file and a text file of so many short prompts each."""
    parquet, text = folder / "prompts.parquet", folder / "prompts.txt"
    schema = pa.schema([("prompt", pa.string())])
    with pq.ParquetWriter(parquet, schema) as writer, text.open("w") as file:
        for first in range(0, num_rows, CHUNK_ROWS):
            prompts = [
                f"picture number {number} of a red apple" for number in range(first, min(first + CHUNK_ROWS, num_rows))
            ]
            writer.write_table(pa.table({"prompt": prompts}, schema), row_group_size=100_000)
            file.write("\n".join(prompts) + "\n")
    return [parquet, text]


def measure_plans(num_rows: int, show: Callable[[str], None]) -> dict[str, Any]:
    """Plan a Parquet and a text input of so many rows, each in a process of its own, and report its peak memory."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {"rows": num_rows}
        for path in write_inputs(Path(folder), num_rows):
            with context.Pool(1) as pool:
                found = pool.apply(_plan, (str(path),))
            memory = f"{found['peak_bytes'] / 1e6:.0f} MB"
            show(f"{path.suffix[1:]}: {num_rows:,} rows planned in {found['seconds']:.1f} s, peak memory {memory}")
            result[path.suffix[1:]] = found
    return result


def _plan(path: str) -> dict[str, Any]:
    """Seconds and peak memory of this process, which plans an input with all that a driver imports."""
    import skipvar.distributed.generate  # noqa: F401  (the driver's imports count too)

    started = time.perf_counter()
    plan = plan_input(RunConfig(input=InputConfig(path=path)), num_scales=13)
    units = sum(plan.unit(index).num_rows for index in range(plan.num_units))
    assert units == plan.identity.num_rows
    return {
        "rows": plan.identity.num_rows,
        "units": plan.num_units,
        "seconds": round(time.perf_counter() - started, 2),
        "peak_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    """The most memory that this process has held. (`ru_maxrss` would count what its parent held before it.)"""
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
