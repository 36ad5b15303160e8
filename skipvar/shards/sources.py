"""The rows of a range of a Parquet file: one of the user's, or a part of text input in its normal form."""

import io
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, BinaryIO, TypeGuard

import pyarrow as pa
import pyarrow.parquet as pq

from skipvar.errors import InputError, RowError, SkipvarError, first_line
from skipvar.shards.columns import UNFIT_ERRORS
from skipvar.shards.inputs import Inputs
from skipvar.shards.rows import InputRow
from skipvar.shards.schema import storable_columns
from skipvar.shards.storage import explain_os_error
from skipvar.types import FileSlice

HIDDEN = (("row_error", pa.string()), ("source_file", pa.string()), ("source_row", pa.int64()))
"""A part's first columns: what is wrong with the row, and where it comes from. Known by their place: a column of the
user's may have the same name."""
_FOOTER_GUESS_BYTES = 64 << 10
_BATCH_ROWS = 4096
_DAMAGE_ERRORS = (OSError, EOFError, MemoryError, *UNFIT_ERRORS)

RowValues = tuple[Sequence[Any], SkipvarError | None]
"""A row's values in the order of the file's columns, and why it is bad. Of a bad row there may be none."""


def open_parquet(stream: BinaryIO, uri: str, *, is_part: bool = False) -> tuple[FileSlice, pq.ParquetFile]:
    """All rows of a Parquet file, and their reader, from its last bytes.

    `InputError` where it is none, `StorageError` where it cannot be read.
    """
    try:
        size = stream.seek(0, io.SEEK_END)
        tail = _tail(stream, min(size, _FOOTER_GUESS_BYTES))
        needed = int.from_bytes(tail[-8:-4], "little") + 8
        if len(tail) < 12 or tail[-4:] != b"PAR1" or needed > size:
            raise InputError(f"{uri} is not a readable Parquet file: its end is not a Parquet footer.")
        tail = _tail(stream, needed) if needed > len(tail) else tail[-needed:]
        metadata = pq.read_metadata(io.BytesIO(b"PAR1" + tail))
        stream.seek(0)
        reader = pq.ParquetFile(stream, metadata=metadata, page_checksum_verification=True)
        groups = sum(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    except _DAMAGE_ERRORS as error:
        if _is_of_disk(error):
            raise explain_os_error(error, f"read {uri}") from error
        raise InputError(f"{uri} is not a readable Parquet file: {first_line(error)}.") from error
    if groups != metadata.num_rows or groups < 0:
        raise InputError(f"{uri} is not a readable Parquet file: its row groups do not have the rows that it counts.")
    checksum = zlib.crc32(tail)
    whole = FileSlice(uri=uri, first_row=0, num_rows=groups, size=size, footer_checksum=checksum, is_part=is_part)
    return whole, reader


def read_rows(inputs: Inputs, part: FileSlice, columns: pa.Schema) -> Iterator[InputRow]:
    """The rows of the slice, in order, with the user's own `columns` in these types. `InputError` where the file is no
    longer what was planned; rows of a row group that cannot be read are bad rows.
    """
    num_hidden = 0
    if part.is_part:
        num_hidden, columns = len(HIDDEN), pa.schema([])  # it has the plan's types already
    number = part.first_row
    with inputs.open(part.uri) as stream:
        reader = _open_unchanged(stream, part)
        names = reader.schema_arrow.names[num_hidden:]
        for values, error in _slice_values(reader, part, columns):
            number += 1
            where = f"{part.uri.rpartition('/')[2]}, row {number}"
            if num_hidden and error is None:
                row_error, file, row = values[:num_hidden]
                where = f"{file}, row {row}"
                error = RowError(row_error) if row_error else None
            yield InputRow(dict(zip(names, values[num_hidden:], strict=False)), error, where)


def _open_unchanged(stream: BinaryIO, part: FileSlice) -> pq.ParquetFile:
    if stream.seek(0, io.SEEK_END) == part.size:
        found, reader = open_parquet(stream, part.uri)
        if found.footer_checksum == part.footer_checksum:
            return reader
    raise InputError(
        f"{part.uri} is not what it was when the run was planned; restore it, or start a new run with another output."
    )


def _slice_values(reader: pq.ParquetFile, part: FileSlice, columns: pa.Schema) -> Iterator[RowValues]:
    """Row group by row group: what comes before the slice in the first of them is read in vain."""
    metadata = reader.metadata
    ends = list(accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)))
    at, stop = part.first_row, part.first_row + part.num_rows
    while at < stop:
        group = bisect_right(ends, at)
        start, end = ends[group] - metadata.row_group(group).num_rows, min(stop, ends[group])
        try:
            yield from _group_values(reader, group, at - start, end - at, columns)
        except OSError as error:
            raise explain_os_error(error, f"read {part.uri}") from error
        at = end


def _group_values(reader: pq.ParquetFile, group: int, skip: int, count: int, columns: pa.Schema) -> Iterator[RowValues]:
    """`count` rows of a row group after the first `skip`."""
    batches = reader.iter_batches(_BATCH_ROWS, row_groups=[group], use_threads=False)
    while count:
        try:
            batch = next(batches)
            values = _batch_values(batch.slice(skip, count), columns)
        except (StopIteration, *_DAMAGE_ERRORS) as error:
            if _is_of_disk(error):
                raise
            reason = "it is shorter than it says" if isinstance(error, StopIteration) else first_line(error)
            damage = InputError(f"row group {group} is damaged ({reason})")
            yield from (((), damage) for _ in range(count))
            return
        skip = max(0, skip - batch.num_rows)
        count -= len(values)
        yield from values


def _batch_values(batch: pa.RecordBatch, columns: pa.Schema) -> list[RowValues]:
    """Rows as Python values; one with a value that has none (text that is no UTF-8, a date beyond the year 9999), or
    none in its column's type, is a RowError."""
    kinds = [columns.field(name).type if name in columns.names else None for name in batch.schema.names]
    try:
        lists = [_values(column, kind) for column, kind in zip(batch.columns, kinds, strict=True)]
    except UNFIT_ERRORS:
        return [_row_values(batch.slice(at, 1), kinds) for at in range(batch.num_rows)]
    return [(row, None) for row in zip(*lists, strict=True)]


def _row_values(row: pa.RecordBatch, kinds: Sequence[pa.DataType | None]) -> RowValues:
    """What can be read of a batch of one row."""
    values: list[Any] = []
    error = None
    for column, kind in zip(row.columns, kinds, strict=True):
        try:
            values += _values(column, kind)
        except UNFIT_ERRORS as found:
            values.append(None)
            error = error or RowError(f"a value cannot be read ({first_line(found)})")
    return values, error


def _values(column: pa.Array, kind: pa.DataType | None) -> list[Any]:
    """A column's values as those of type `kind`; None: as they are."""
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    if pa.types.is_temporal(column.type) and getattr(column.type, "unit", None) == "ns":  # Python's times have none
        column = column.cast(storable_columns([pa.field("", column.type)], "").types[0], safe=False)
    if kind in (None, column.type):
        return column.to_pylist()
    if pa.types.is_decimal(column.type) and pa.types.is_floating(kind):  # Arrow takes no `Decimal` for a float
        column = column.cast(kind)
    return pa.array(column.to_pylist(), kind).to_pylist()


def _is_of_disk(error: Exception) -> TypeGuard[OSError]:
    """Whether it is the disk's trouble, not the file's."""
    return isinstance(error, OSError) and error.errno is not None


def _tail(stream: BinaryIO, count: int) -> bytes:
    stream.seek(-count, io.SEEK_END)
    return stream.read(count)
