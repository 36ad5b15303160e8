"""A look at every file of the input: Parquet footers, text files' first rows; which columns there are, of what type."""

import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from skipvar.config import InputConfig, RunConfig
from skipvar.errors import InputError, first_line
from skipvar.shards.columns import UNFIT_ERRORS, infer_csv, infer_json, shown_name
from skipvar.shards.inputs import InputFile, Inputs
from skipvar.shards.rows import SETTINGS
from skipvar.shards.schema import storable_columns
from skipvar.shards.sources import read_footer
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
    rows: FileSlice | None = None
    """Of Parquet: all."""


def look_at_all(inputs: Inputs, config: RunConfig) -> tuple[list[LookedAt], pa.Schema]:
    """Every file of the input, in order, and one type for each of the user's own columns over all of them.

    `InputError` names a file that lacks the prompt's column, cannot be read, or has a column of another type. The
    columns of files that begin beyond `input.limit` or are empty do not count.
    """
    files = inputs.find(config.input.path)
    left = sys.maxsize if config.input.limit is None else config.input.limit
    found: list[LookedAt] = []
    counting: list[LookedAt] = []
    for file, footer in zip(files, _read_footers(inputs, files), strict=True):
        if footer is not None:
            rows, metadata = footer
            schema = metadata.schema.to_arrow_schema()
            one, num_rows = LookedAt(file, schema.names, _own_columns(file, schema, config.input), rows), rows.num_rows
        else:
            one, num_rows = _look_at_text(inputs, file, config.input, min(SAMPLE_ROWS, max(0, left)))
        _check_names(one, config.input.prompt_column)
        found.append(one)
        if num_rows and left > 0:
            counting.append(one)
        left -= num_rows
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


def _look_at_text(inputs: Inputs, file: InputFile, config: InputConfig, max_rows: int) -> tuple[LookedAt, int]:
    """Columns and types of a text file from its first rows, and how many these are."""
    with inputs.open(file.uri) as stream:
        rows = TextRows(stream, file, config.prompt_column)
        sample = []
        for row in islice(rows, max_rows):
            sample.append(row)
            if rows.num_bytes >= SAMPLE_BYTES:
                break
    good: list[dict[str, Any]] = [row for row in sample if isinstance(row, dict)]  # others become error rows
    names = _names(file, rows, good, config.prompt_column)
    if len(names) > MAX_COLUMNS:
        raise InputError(
            f"{file.uri} has {len(names)} columns; at most {MAX_COLUMNS} are accepted; put what differs from row to "
            "row into one column."
        )
    own = [name for name in names if name not in _special(config)]
    return LookedAt(file, names, (infer_csv if file.format == "csv" else infer_json)(good, own)), len(sample)


def _names(file: InputFile, rows: TextRows, sample: Sequence[dict[str, Any]], prompt_column: str) -> Sequence[str]:
    if file.format == "txt":
        return [prompt_column]
    return rows.header or list(dict.fromkeys(name for row in sample for name in row))


def _read_footers(inputs: Inputs, files: Sequence[InputFile]) -> list[tuple[FileSlice, pq.FileMetaData] | None]:
    """Parquet files' footers, several at a time: on S3 each takes two round trips."""

    def read(file: InputFile) -> tuple[FileSlice, pq.FileMetaData] | None:
        if file.format != "parquet":
            return None
        with inputs.open(file.uri) as stream:
            return read_footer(stream, file.uri)

    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        return list(pool.map(read, files))


def _own_columns(file: InputFile, columns: pa.Schema, config: InputConfig) -> pa.Schema:
    """The user's own columns, which the dataset can take; the prompt's is one of text."""
    own = [column for column in columns if column.name not in _special(config)]
    for at in columns.get_all_field_indices(config.prompt_column):
        kind = storable_columns([columns.field(at)], file.uri).types[0]
        if not pa.types.is_string(kind):
            raise InputError(f"{file.uri}: column {shown_name(config.prompt_column)} is {kind}; prompts must be text.")
    try:
        storable_columns(own, file.uri)
    except UNFIT_ERRORS as error:
        raise InputError(f"{file.uri}: its columns cannot be used ({first_line(error)}).") from error
    return pa.schema(own)


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
