"""Planning a large input takes little memory: counts and offsets, no rows."""

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.making import make_config
from skipvar.shards.prompts import plan_input, read_unit

NUM_ROWS = 1_000_000


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_a_million_rows_in_little_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        prompts = pa.array(np.char.add("prompt ", np.arange(NUM_ROWS).astype(str)))
        pq.write_table(pa.table({"prompt": prompts}), path, row_group_size=50_000)
    else:
        line = "prompt {}\n" if suffix == "txt" else '{{"prompt": "prompt {}"}}\n'
        with path.open("w") as file:
            file.writelines(line.format(i) for i in range(NUM_ROWS))
    config = make_config(input__path=str(path), output__unit_rows=64)
    tracemalloc.start()
    plan = plan_input(config)
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.num_rows == NUM_ROWS and plan.num_units == NUM_ROWS // 64
    assert size < 2_000_000 and peak < 30_000_000
    unit = plan.unit(NUM_ROWS // 64 - 1)
    assert [item.prompt for item in read_unit(unit, plan.spec)] == [f"prompt {NUM_ROWS - 64 + i}" for i in range(64)]
