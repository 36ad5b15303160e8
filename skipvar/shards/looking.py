"""A look at every file of the input: Parquet footers, text files' first rows; which columns there are, of what type."""

import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from skipvar.config import InputConfig, RunConfig
from skipvar.errors import InputError, first_line
from skipvar.shards.columns import UNFIT_ERRORS, infer_csv, infer_json, shown_name
from skipvar.shards.inputs import InputFile, Inputs
from skipvar.shards.rows import SETTINGS
from skipvar.shards.schema import storable_columns
from skipvar.shards.sources import open_parquet
from skipvar.shards.textrows import TextRows
from skipvar.types import FileSlice

_FOOTER_THREADS = 16
SAMPLE_ROWS = 10_000
SAMPLE_BYTES = 32 << 20
MAX_COLUMNS = 2_000


@dataclass(frozen=True)
class LookedAt:
    """A file of the input and its columns."""

    file: InputFile
    columns: Sequence[str]
    """All names, those that are settings too."""
    own: pa.Schema
    """The user's own columns; of Parquet as the file has them."""
    num_rows: int
    """Of Parquet all, of text those that were looked at."""
    rows: FileSlice | None = None
    """Of Parquet: all."""


def look_at_all(inputs: Inputs, config: RunConfig) -> tuple[list[LookedAt], pa.Schema]:
    """Every file of the input, in order, and one type for each of the user's own columns over all of them.

    `InputError` names a file that lacks the prompt's column, cannot be read, or has a column of another type. The
    columns of files that begin beyond `input.limit` or are empty do not count.
    """
    files = inputs.find(config.input.path)
    parquet = [file for file in files if file.format == "parquet"]
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:  # on S3 each takes two round trips
        looks = pool.map(lambda file: _look_at_parquet(inputs, file, config.input), parquet)
    left = sys.maxsize if config.input.limit is None else config.input.limit
    found: list[LookedAt] = []
    counting: list[LookedAt] = []
    for file in files:
        one = next(looks) if file.format == "parquet" else _look_at_text(inputs, file, config.input, max(0, left))
        _check_names(one, config.input.prompt_column)
        found.append(one)
        if one.num_rows and left > 0:
            counting.append(one)
        left -= one.num_rows
    _check_id_column(config.input.id_column, found)
    return found, storable_columns(_unified(counting), files[0].uri)


def special_columns(files: Iterable[LookedAt], config: InputConfig) -> list[str]:
    """Which of the prompt's, the id's and the settings' columns these files may have: a line of jsonl any of them."""
    special = _special(config)
    found = {name for one in files for name in (special if one.file.format == "jsonl" else one.columns)}
    return [name for name in special if name in found]


def _special(config: InputConfig) -> Sequence[str]:
    return (config.prompt_column, config.id_column, *SETTINGS)


def _unified(files: Iterable[LookedAt]) -> pa.Schema:
    result = pa.schema([])
    for found in files:
        if found.own.equals(result, check_metadata=True):
            continue
        try:
            result = pa.unify_schemas([result, found.own], promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(
                f"{found.file.uri}: a column has another type than in the files before it ({first_line(error)})."
            ) from error
    return result


def _look_at_parquet(inputs: Inputs, file: InputFile, config: InputConfig) -> LookedAt:
    with inputs.open(file.uri) as stream:
        rows, reader = open_parquet(stream, file.uri)
    try:
        schema = reader.metadata.schema.to_arrow_schema()
        own = [column for column in schema if column.name not in _special(config)]
        storable_columns(own, file.uri)
    except UNFIT_ERRORS as error:
        raise InputError(f"{file.uri}: its columns cannot be used ({first_line(error)}).") from error
    for at in schema.get_all_field_indices(config.prompt_column):
        kind = storable_columns([schema.field(at)], file.uri).types[0]
        if not pa.types.is_string(kind):
            raise InputError(f"{file.uri}: column {shown_name(config.prompt_column)} is {kind}; prompts must be text.")
    return LookedAt(file, schema.names, pa.schema(own), rows.num_rows, rows)


def _look_at_text(inputs: Inputs, file: InputFile, config: InputConfig, limit: int) -> LookedAt:
    """From the first rows."""
    sample = []
    with inputs.open(file.uri) as stream:
        rows = TextRows(stream, file, config.prompt_column)
        for row in islice(rows, min(SAMPLE_ROWS, limit)):
            sample.append(row)
            if rows.num_bytes >= SAMPLE_BYTES:
                break
    good: list[dict[str, Any]] = [row for row in sample if isinstance(row, dict)]  # others become error rows
    names: Sequence[str] = [config.prompt_column]
    if file.format != "txt":
        names = rows.header or list(dict.fromkeys(name for row in good for name in row))
    if len(names) > MAX_COLUMNS:
        raise InputError(
            f"{file.uri} has {len(names)} columns; at most {MAX_COLUMNS} are accepted; put what differs from row to "
            "row into one column."
        )
    infer = infer_csv if file.format == "csv" else infer_json
    return LookedAt(file, names, infer(good, [name for name in names if name not in _special(config)]), len(sample))


def _check_names(found: LookedAt, wanted: str) -> None:
    names = found.columns
    if len(set(names)) < len(names):
        raise InputError(f"{found.file.uri}: two columns have one name; names must differ.")
    if wanted not in names and (names or found.file.format != "jsonl"):
        shown = ", ".join(name if len(name) <= 40 else name[:37] + "..." for name in names[:20]) or "none"
        raise InputError(
            f"{found.file.uri} has no column {shown_name(wanted)}; it has {shown[:200]}; "
            "name the right one by input.prompt_column."
        )


def _check_id_column(name: str, files: Sequence[LookedAt]) -> None:
    """An id column that the user named must be somewhere; the default one need not. A jsonl row may lack it."""
    if name != "id" and not any(name in found.columns for found in files):
        raise InputError(f"input.id_column: no file of the input has a column {shown_name(name)}.")
