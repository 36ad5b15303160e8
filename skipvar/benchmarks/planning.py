"""What a driver takes to plan a large input. No torch in here: a driver has none."""

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from skipvar.config import InputConfig, RunConfig
from skipvar.shards.prompts import plan_input

CHUNK_ROWS = 1_000_000


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
