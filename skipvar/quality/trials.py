"""Reads the trials of a run whose policy is `trials`."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from skipvar.errors import InputError
from skipvar.shards.schema import READ_TRIAL_COLUMNS, trial_of_columns
from skipvar.shards.storage import Storage
from skipvar.shards.unitfile import data_files
from skipvar.types import Trial


def read_trials(storage: Storage) -> list[Trial]:
    """The trials that are published in a run's output, in the order of their requests.

    Raises `InputError` where there are none, or damaged ones.
    """
    try:
        rows = sorted(_rows(storage), key=lambda row: (row["position"], row["image_index"]))
        if not rows:
            raise InputError(f"{storage.uri}: holds no trials; jobs.calibrate makes them.")
        return [trial_of_columns(row) for row in rows]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{storage.uri}: its trials cannot be read; `skipvar verify OUTPUT` tells which files are damaged."
        ) from error


def _rows(storage: Storage) -> Iterator[dict[str, Any]]:
    wanted = ("position", "image_index", *READ_TRIAL_COLUMNS)
    for _, name in data_files(storage):
        with storage.open(name) as file, pq.ParquetFile(file, pre_buffer=False) as parquet:
            names = parquet.schema_arrow.names
            table = parquet.read(columns=[name for name in wanted if name in names], use_threads=False)
        if "trial_ssim" not in names or table["trial_ssim"].null_count:
            raise InputError(f"{storage.uri}: is no run of trials; jobs.calibrate makes one.")
        yield from table.to_pylist()
