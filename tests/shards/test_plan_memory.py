"""Planning a large input takes little memory: counts and row ranges, no rows."""

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.making import NUM_SCALES, make_config
from skipvar.shards.prompts import plan_input, read_unit


@pytest.mark.parametrize(("suffix", "num_rows"), [("txt", 256_000), ("jsonl", 256_000), ("parquet", 1_024_000)])
def test_many_rows_in_little_memory(tmp_path: Path, suffix: str, num_rows: int) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        prompts = pa.array(np.char.add("prompt ", np.arange(num_rows).astype(str)))
        pq.write_table(pa.table({"prompt": prompts}), path, row_group_size=50_000)
    else:
        line = "prompt {}\n" if suffix == "txt" else '{{"prompt": "prompt {}"}}\n'
        with path.open("w") as file:
            file.writelines(line.format(i) for i in range(num_rows))
    config = make_config(input__path=str(path), output__unit_rows=64)
    plan_input(make_config(input__path=str(path), input__limit=1), NUM_SCALES)  # loads what Arrow loads when first used
    tracemalloc.start()
    plan = plan_input(config, NUM_SCALES)
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.identity.num_rows == num_rows and plan.num_units == num_rows // 64
    assert size < 2_000_000 and peak < 30_000_000
    unit = plan.unit(num_rows // 64 - 1)
    assert [item.prompt for item in read_unit(unit, plan.spec)] == [f"prompt {num_rows - 64 + i}" for i in range(64)]
