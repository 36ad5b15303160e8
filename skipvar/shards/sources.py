"""The rows of a slice of an input file, format by format, after a check that the file is still what was planned."""

import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from skipvar.errors import InputError, RowError
from skipvar.shards import textscan
from skipvar.shards.columns import fit_csv, fit_json, parse_json
from skipvar.shards.inputs import Inputs
from skipvar.shards.rows import FileSpec
from skipvar.shards.schema import storable_columns
from skipvar.types import FileSlice

_FOOTER_GUESS_BYTES = 64 << 10
_BATCH_ROWS = 4096

Row = dict[str, Any] | RowError
"""A row's values by column, or why it has none."""


@dataclass(frozen=True)
class Footer:
    """What a plan needs of a Parquet file."""

    num_rows: int
    schema: pa.Schema
    checksum: int


def read_footer(stream: BinaryIO, uri: str, size: int) -> Footer:
    """Number of rows and columns from the last bytes of a Parquet file."""
    tail = _tail(stream, min(size, _FOOTER_GUESS_BYTES))
    needed = int.from_bytes(tail[-8:-4], "little") + 8
    if len(tail) < 12 or tail[-4:] != b"PAR1" or needed > size:
        raise InputError(f"{uri} is not a readable Parquet file: its end is not a Parquet footer.")
    tail = _tail(stream, needed) if needed > len(tail) else tail[-needed:]
    try:
        metadata = pq.read_metadata(io.BytesIO(b"PAR1" + tail))
        return Footer(metadata.num_rows, metadata.schema.to_arrow_schema(), zlib.crc32(tail))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{uri} is not a readable Parquet file: {str(error).splitlines()[0]}.") from error


def _tail(stream: BinaryIO, count: int) -> bytes:
    stream.seek(-count, io.SEEK_END)
    return stream.read(count)


def _read_bytes(inputs: Inputs, part: FileSlice) -> bytes:
    """A text slice's bytes, exactly those that were planned."""
    assert part.byte_offset is not None and part.num_bytes is not None
    with inputs.open(part.uri) as stream:
        stream.seek(part.byte_offset)
        data = stream.read(part.num_bytes)
    if zlib.crc32(data) != part.checksum:
        raise _changed(part)
    return data


def _changed(part: FileSlice) -> InputError:
    return InputError(
        f"{part.uri} is not what it was when the run was planned; restore it, or start a new run with another output."
    )


def _read_txt(inputs: Inputs, part: FileSlice, file: FileSpec) -> Iterator[Row]:
    for line in io.BytesIO(_read_bytes(inputs, part)):
        if not line.isspace():
            yield {file.columns[0]: line.decode().rstrip("\r\n")}


def _read_jsonl(inputs: Inputs, part: FileSlice, _file: FileSpec) -> Iterator[Row]:
    for line in io.BytesIO(_read_bytes(inputs, part)):
        if not line.isspace():
            try:
                yield parse_json(line)
            except RowError as error:
                yield error


def _read_csv(inputs: Inputs, part: FileSlice, file: FileSpec) -> Iterator[Row]:
    lines = (line.decode() for line in io.BytesIO(_read_bytes(inputs, part)))
    for record in textscan.read_records(lines, part.uri):
        if len(record) == len(file.columns):
            yield dict(zip(file.columns, record, strict=True))
        elif record:
            yield RowError(f"the row has {len(record)} fields; the header has {len(file.columns)}")


def _read_parquet(inputs: Inputs, part: FileSlice, file: FileSpec) -> Iterator[Row]:
    """Rows of the row groups that the slice touches; what lies before it in the first group is read in vain."""
    with inputs.open(part.uri) as stream:
        size = stream.seek(0, io.SEEK_END)
        if size != file.size or read_footer(stream, part.uri, size).checksum != file.footer_checksum:
            raise _changed(part)
        stream.seek(0)
        try:
            reader = pq.ParquetFile(stream)
            groups, skip = _row_groups(reader.metadata, part)
            yield from _rows(reader.iter_batches(_BATCH_ROWS, row_groups=groups), skip, part.num_rows)
        except pa.ArrowException as error:
            raise InputError(f"{part.uri} cannot be read: {str(error).splitlines()[0]}.") from error


def _row_groups(metadata: pq.FileMetaData, part: FileSlice) -> tuple[list[int], int]:
    """The row groups of a slice, and how many rows of the first one come before it."""
    ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
    first = int(np.searchsorted(ends, part.first_row, side="right"))
    last = int(np.searchsorted(ends, part.first_row + part.num_rows - 1, side="right"))
    return list(range(first, last + 1)), part.first_row - (int(ends[first - 1]) if first else 0)


def _rows(batches: Iterable[pa.RecordBatch], skip: int, count: int) -> Iterator[Row]:
    """`count` rows after the first `skip`."""
    for batch in batches:
        wanted = batch.slice(skip, count)
        skip = max(0, skip - batch.num_rows)
        count -= wanted.num_rows
        yield from _values(wanted)
        if count == 0:
            return


def _values(batch: pa.RecordBatch) -> list[Row]:
    """Rows as Python values; one that has none (text that is no UTF-8, a date beyond the year 9999) is a RowError."""
    for at, field in enumerate(batch.schema):
        if pa.types.is_temporal(field.type) and getattr(field.type, "unit", None) == "ns":  # Python's times have none
            plain = storable_columns([field], "").field(0)
            batch = batch.set_column(at, plain, batch.column(at).cast(plain.type, safe=False))
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [RowError(f"a value cannot be read ({str(error).splitlines()[0]})")]
        return [row for at in range(batch.num_rows) for row in _values(batch.slice(at, 1))]


READERS: dict[str, Callable[..., Iterator[Row]]] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
}


def _fit_as_is(value: Any, _field: pa.Field) -> Any:
    return value


FITS: dict[str, Callable[[Any, pa.Field], Any]] = {
    "txt": _fit_as_is,
    "jsonl": fit_json,
    "csv": lambda value, field: None if value is None else fit_csv(value, field),
    "parquet": _fit_as_is,
}
