"""Trials that are read back: what is none, or damaged, is one sentence."""

from pathlib import Path

import pytest
from shards.making import make_dataset

from skipvar.errors import InputError
from skipvar.quality.trials import read_trials


def test_a_dataset_without_trials_and_one_with_damaged_files(tmp_path: Path) -> None:
    job = make_dataset(tmp_path, ["a", "b"])
    with pytest.raises(InputError, match="is no run of trials"):
        read_trials(job.storage)
    [path] = (tmp_path / "out" / "data").glob("*.parquet")
    good = path.read_bytes()
    for data in (b"", b"PAR1", good[: len(good) // 2], good[:40] + bytes(200) + good[240:]):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"its trials cannot be read|is no run of trials"):
            read_trials(job.storage)
