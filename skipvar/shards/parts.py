"""Text input in its normal form: typed Parquet parts, written to a local folder, published under `_input/`."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from skipvar.errors import StorageError, first_line
from skipvar.shards.columns import UNFIT_ERRORS
from skipvar.shards.storage import Storage, explain_os_error, join
from skipvar.shards.unitfile import read_table
from skipvar.types import FileSlice

INPUT = "_input/"
HIDDEN = (("row_error", pa.string()), ("source_file", pa.string()), ("source_row", pa.int64()))
"""A part's first columns: what is wrong with the row, and where it comes from. Known by their place: a column of the
user's may have the same name."""
ROW_GROUP_ROWS, ROW_GROUP_BYTES = 4096, 1 << 20
"""Small, so that reading a unit's few rows is cheap."""
PART_ROWS, PART_BYTES = 1 << 20, 64 << 20
"""A part is published by one upload from memory. Borders are drawn by rows and raw bytes: the same input gives the same
parts, whatever the compression makes of them."""
_ROW_OVERHEAD_BYTES = 32


@dataclass(frozen=True)
class Part:
    """One part, wherever it lies."""

    uri: str
    num_rows: int


@dataclass(frozen=True)
class LocalParts:
    """Parts that are not published yet. Their folder goes when nobody refers to it any more."""

    folder: "tempfile.TemporaryDirectory[str]"
    parts: Sequence[Part]


def part_name(number: int) -> str:
    """Where the part of this number lies in the output: `_input/part-NNNNN.parquet`."""
    return f"{INPUT}part-{number:05d}.parquet"


def part_slices(parts: Sequence[Part], first_row: int, num_rows: int) -> Iterator[FileSlice]:
    """Where `num_rows` rows from `first_row` of all parts together lie."""
    start = 0
    for part in parts:
        begin, end = max(first_row - start, 0), min(first_row + num_rows - start, part.num_rows)
        if begin < end:
            yield FileSlice(uri=part.uri, first_row=begin, num_rows=end - begin)
        start += part.num_rows


class PartWriter:
    """Writes rows into parts in a local folder; holds one row group in memory."""

    def __init__(self, schema: pa.Schema) -> None:
        """`schema`: the rows' columns, the hidden ones not among them."""
        self._schema = pa.schema([*(pa.field(*pair) for pair in HIDDEN), *schema])
        self._columns: list[list[Any]] = [[] for _ in self._schema]
        self._group_bytes = self._part_bytes = self._part_rows = 0
        self._writer: pq.ParquetWriter | None = None
        self._parts: list[Part] = []
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="skipvar-input-")
        except OSError as error:
            raise explain_os_error(error, f"write to {tempfile.gettempdir()} (TMPDIR names another folder)") from error
        self.num_rows = 0

    def add(self, row: Sequence[Any], num_bytes: int) -> None:
        """Take a row: its error, file and number there, then its values in the order of the schema."""
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)
        self._group_bytes += num_bytes + _ROW_OVERHEAD_BYTES
        self.num_rows += 1
        if self._group_bytes >= ROW_GROUP_BYTES or len(self._columns[0]) >= ROW_GROUP_ROWS:
            self._flush()
            if self._part_bytes >= PART_BYTES or self._part_rows >= PART_ROWS:
                self._end_part()

    def finish(self) -> LocalParts:
        """Write what is still in memory and end the last part; all of them, in the order of their rows."""
        self._flush()
        self._end_part()
        return LocalParts(self._folder, tuple(self._parts))

    def _flush(self) -> None:
        if not self._columns[0]:
            return
        batch = self._batch()
        try:
            if self._writer is None:
                self._writer = pq.ParquetWriter(
                    self._path(),
                    self._schema,
                    compression="zstd",
                    use_dictionary=["source_file"],
                    write_statistics=False,
                    write_page_checksum=True,
                )
            self._writer.write_batch(batch, row_group_size=batch.num_rows)
        except OSError as error:
            raise self._explained(error) from error
        self._part_rows += batch.num_rows
        self._part_bytes += self._group_bytes
        self._group_bytes = 0
        self._columns = [[] for _ in self._schema]

    def _batch(self) -> pa.RecordBatch:
        """The waiting rows. One with a value that Arrow cannot take becomes an error row."""
        try:
            return self._to_batch(self._columns)
        except UNFIT_ERRORS:
            rows = [self._checked(list(row)) for row in zip(*self._columns, strict=True)]
            return self._to_batch([list(column) for column in zip(*rows, strict=True)])

    def _checked(self, row: list[Any]) -> list[Any]:
        try:
            self._to_batch([[value] for value in row])
        except UNFIT_ERRORS as error:
            nothing = [None] * (len(row) - len(HIDDEN))
            return [row[0] or f"the row cannot be stored ({first_line(error)})", *row[1 : len(HIDDEN)], *nothing]
        return row

    def _to_batch(self, columns: Sequence[list[Any]]) -> pa.RecordBatch:
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        return pa.RecordBatch.from_arrays(arrays, schema=self._schema)

    def _end_part(self) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                raise self._explained(error) from error
            self._parts.append(Part(self._path(), self._part_rows))
        self._writer = None
        self._part_rows = self._part_bytes = 0

    def _path(self) -> str:
        return str(Path(self._folder.name) / f"part-{len(self._parts):05d}.parquet")

    def _explained(self, error: OSError) -> StorageError:
        return explain_os_error(error, f"write {self._path()} (TMPDIR names another folder)")


def publish_parts(local: LocalParts, storage: Storage) -> list[Part]:
    """Put the parts beside the dataset. Those that an earlier attempt published stay: their rows are the same."""
    published = []
    for number, part in enumerate(local.parts):
        name = part_name(number)
        data = Path(part.uri).read_bytes()
        if not storage.put_if_absent(name, data) and not _same_rows(storage.read(name), data):
            raise StorageError(f"{join(storage.uri, name)} is not of this run's input; give another output.path.")
        published.append(Part(join(storage.uri, name), part.num_rows))
    local.folder.cleanup()
    return published


def find_parts(storage: Storage) -> list[Part]:
    """The parts that are published under this output, up to the first that is missing."""
    names = {entry.name for entry in storage.list(INPUT)}
    found: list[Part] = []
    while (name := part_name(len(found))) in names:
        found.append(Part(join(storage.uri, name), _num_rows(storage, name)))
    return found


def _same_rows(present: bytes, data: bytes) -> bool:
    """Whether two parts hold the same rows: another version of pyarrow may write them in other bytes."""
    if present == data:
        return True
    try:
        return bool(read_table(present).equals(read_table(data)))
    except (pa.ArrowException, OSError):
        return False


def _num_rows(storage: Storage, name: str) -> int:
    try:
        with storage.open(name) as file:
            return int(pq.read_metadata(file).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise StorageError(
            f"{join(storage.uri, name)} is damaged ({first_line(error)}); delete it and run the same command again."
        ) from error
