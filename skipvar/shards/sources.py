"""The rows of a range of a Parquet file: one of the user's, or a part of text input in its normal form."""

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from skipvar.errors import InputError, RowError, SkipvarError, first_line
from skipvar.shards.columns import UNFIT_ERRORS
from skipvar.shards.inputs import Inputs
from skipvar.shards.parts import HIDDEN
from skipvar.shards.rows import FileSpec
from skipvar.shards.schema import storable_columns
from skipvar.shards.storage import explain_os_error
from skipvar.types import FileSlice

_FOOTER_GUESS_BYTES = 64 << 10
_BATCH_ROWS = 4096
_DAMAGE_ERRORS = (OSError, EOFError, MemoryError, *UNFIT_ERRORS)


class InputRow(NamedTuple):
    """A row of the input before it is checked."""

    values: dict[str, Any]
    """By column; of a bad row what there is."""
    error: SkipvarError | None
    """Why the row is bad, where that is known already."""
    where: str
    """File and row, for messages."""


@dataclass(frozen=True)
class Footer:
    """What the end of a Parquet file tells."""

    metadata: pq.FileMetaData
    schema: pa.Schema
    checksum: int

    @property
    def num_rows(self) -> int:
        return int(self.metadata.num_rows)


def read_footer(stream: BinaryIO, uri: str, size: int) -> Footer:
    """Number of rows and columns from the last bytes of a Parquet file."""
    tail = _tail(stream, min(size, _FOOTER_GUESS_BYTES))
    needed = int.from_bytes(tail[-8:-4], "little") + 8
    if len(tail) < 12 or tail[-4:] != b"PAR1" or needed > size:
        raise InputError(f"{uri} is not a readable Parquet file: its end is not a Parquet footer.")
    tail = _tail(stream, needed) if needed > len(tail) else tail[-needed:]
    try:
        metadata = pq.read_metadata(io.BytesIO(b"PAR1" + tail))
        footer = Footer(metadata, metadata.schema.to_arrow_schema(), zlib.crc32(tail))
        groups = sum(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    except _DAMAGE_ERRORS as error:
        raise InputError(f"{uri} is not a readable Parquet file: {first_line(error)}.") from error
    if groups != metadata.num_rows or metadata.num_rows < 0:
        raise InputError(f"{uri} is not a readable Parquet file: its row groups do not have the rows that it counts.")
    return footer


def read_rows(inputs: Inputs, part: FileSlice, spec: FileSpec) -> Iterator[InputRow]:
    """The rows of the slice, in order. `InputError` where the file is no longer what was planned; rows of a row group
    that cannot be read are bad rows.
    """
    name = part.uri.rpartition("/")[2]
    number = part.first_row
    for values, error in _read_values(inputs, part, spec):
        number += 1
        if not spec.is_part:
            yield InputRow(values, error, f"{name}, row {number}")
        elif error is None:
            row_error, file, row = (values.pop(hidden) for hidden in _HIDDEN_KEYS)
            yield InputRow(values, RowError(row_error) if row_error else None, f"{file}, row {row}")
        else:
            yield InputRow({}, error, f"{name}, row {number}")


_HIDDEN_KEYS = tuple(range(len(HIDDEN)))
"""A part's first columns go by their place, as no column of the user's does."""

Values = tuple[dict[Any, Any], SkipvarError | None]


def _read_values(inputs: Inputs, part: FileSlice, spec: FileSpec) -> Iterator[Values]:
    with inputs.open(part.uri) as stream:
        size = stream.seek(0, io.SEEK_END)
        footer = read_footer(stream, part.uri, size) if size == spec.size else None
        if footer is None or footer.checksum != spec.footer_checksum:
            raise InputError(
                f"{part.uri} is not what it was when the run was planned; restore it, or start a new run with another "
                "output."
            )
        stream.seek(0)
        reader = pq.ParquetFile(stream, metadata=footer.metadata, page_checksum_verification=True)
        for group, skip, count in _row_groups(footer.metadata, part):
            try:
                yield from _group_values(reader, group, skip, count, is_part=spec.is_part)
            except OSError as error:
                raise explain_os_error(error, f"read {part.uri}") from error


def _row_groups(metadata: pq.FileMetaData, part: FileSlice) -> Iterator[tuple[int, int, int]]:
    """The row groups of a slice; of each, how many rows come before the slice, and how many belong to it."""
    ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
    stop = part.first_row + part.num_rows
    for group in range(int(np.searchsorted(ends, part.first_row, side="right")), len(ends)):
        start = int(ends[group - 1]) if group else 0
        if start >= stop:
            return
        skip = max(part.first_row - start, 0)
        yield group, skip, min(stop, int(ends[group])) - start - skip


def _group_values(reader: pq.ParquetFile, group: int, skip: int, count: int, *, is_part: bool) -> Iterator[Values]:
    """`count` rows of a row group after the first `skip`. What comes before them is read in vain."""
    batches = reader.iter_batches(_BATCH_ROWS, row_groups=[group], use_threads=False)
    while count:
        try:
            batch = next(batches)
            wanted = batch.slice(skip, count)
            skip = max(0, skip - batch.num_rows)
            values = _values(wanted, is_part=is_part)
        except (StopIteration, *_DAMAGE_ERRORS) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's trouble, not the file's
            reason = "it is shorter than it says" if isinstance(error, StopIteration) else first_line(error)
            damage = InputError(f"row group {group} is damaged ({reason})")
            yield from (({}, damage) for _ in range(count))
            return
        count -= len(values)
        yield from values


def _values(batch: pa.RecordBatch, *, is_part: bool) -> list[Values]:
    """Rows as Python values; one that has none (text that is no UTF-8, a date beyond the year 9999) is a RowError."""
    names: list[Any] = list(batch.schema.names)
    if is_part:
        names[: len(HIDDEN)] = _HIDDEN_KEYS
    columns = []
    for at, field in enumerate(batch.schema):
        column = batch.column(at)
        if pa.types.is_temporal(field.type) and getattr(field.type, "unit", None) == "ns":  # Python's times have none
            column = column.cast(storable_columns([field], "").field(0).type, safe=False)
        columns.append(column)
    try:
        lists = [column.to_pylist() for column in columns]
    except UNFIT_ERRORS as error:
        if batch.num_rows == 1:
            return [({}, RowError(f"a value cannot be read ({first_line(error)})"))]
        return [row for at in range(batch.num_rows) for row in _values(batch.slice(at, 1), is_part=is_part)]
    return [(dict(zip(names, row, strict=True)), None) for row in zip(*lists, strict=True)]


def _tail(stream: BinaryIO, count: int) -> bytes:
    stream.seek(-count, io.SEEK_END)
    return stream.read(count)
