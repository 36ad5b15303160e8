"""Text input in its normal form: typed Parquet parts, written to a local folder, published under `_input/`."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from skipvar.errors import InputError, StorageError
from skipvar.shards.sources import HIDDEN, read_footer
from skipvar.shards.storage import Storage, explain_os_error, join
from skipvar.shards.unitfile import read_table
from skipvar.types import FileSlice

INPUT = "_input/"
ROW_GROUP_ROWS, ROW_GROUP_BYTES = 4096, 1 << 20
"""Small, so that reading a unit's few rows is cheap."""
PART_ROWS, PART_BYTES = 1 << 20, 64 << 20
"""A part is published by one upload from memory. Borders are drawn by rows and raw bytes: the same input gives the same
parts, whatever the compression makes of them."""
_ROW_OVERHEAD_BYTES = 32


@dataclass(frozen=True)
class LocalParts:
    """Parts that are not published yet. Their folder goes when nobody refers to it any more."""

    folder: "tempfile.TemporaryDirectory[str]"
    parts: Sequence[FileSlice]
    """Whole files."""


def part_name(number: int) -> str:
    """Where the part of this number lies in the output: `_input/part-NNNNN.parquet`."""
    return f"{INPUT}part-{number:05d}.parquet"


class PartWriter:
    """Writes rows into parts in a local folder; holds one row group in memory."""

    def __init__(self, schema: pa.Schema) -> None:
        """`schema`: the rows' columns, the hidden ones not among them."""
        self._schema = pa.schema([*(pa.field(*pair) for pair in HIDDEN), *schema])
        self._rows: list[Sequence[Any]] = []
        self._group_bytes = self._part_bytes = self._part_rows = 0
        self._writer: pq.ParquetWriter | None = None
        self._parts: list[FileSlice] = []
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="skipvar-input-")
        except OSError as error:
            raise explain_os_error(error, f"write to {tempfile.gettempdir()} (TMPDIR names another folder)") from error

    def add(self, row: Sequence[Any], num_bytes: int) -> None:
        """Take a row: its error, file and number there, then its values in the order of the schema."""
        self._rows.append(row)
        self._group_bytes += num_bytes + _ROW_OVERHEAD_BYTES
        if self._group_bytes >= ROW_GROUP_BYTES or len(self._rows) >= ROW_GROUP_ROWS:
            self._flush()
            if self._part_bytes >= PART_BYTES or self._part_rows >= PART_ROWS:
                self._end_part()

    def finish(self) -> LocalParts:
        """Write what is still in memory and end the last part; all of them, in the order of their rows."""
        self._flush()
        self._end_part()
        return LocalParts(self._folder, tuple(self._parts))

    def _flush(self) -> None:
        if not self._rows:
            return
        columns = zip(*self._rows, strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        batch = pa.RecordBatch.from_arrays(arrays, schema=self._schema)
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
        self._rows = []

    def _end_part(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
            with Path(self._path()).open("rb") as stream:
                part, _ = read_footer(stream, self._path(), is_part=True)
        except OSError as error:
            raise self._explained(error) from error
        self._parts.append(part)
        self._writer = None
        self._part_rows = self._part_bytes = 0

    def _path(self) -> str:
        return str(Path(self._folder.name) / f"part-{len(self._parts):05d}.parquet")

    def _explained(self, error: OSError) -> StorageError:
        return explain_os_error(error, f"write {self._path()} (TMPDIR names another folder)")


def publish_parts(local: LocalParts, storage: Storage) -> list[FileSlice]:
    """Put the parts beside the dataset. Those that an earlier attempt published stay: their rows are the same."""
    published = []
    for number, part in enumerate(local.parts):
        name, data = part_name(number), Path(part.uri).read_bytes()
        if not storage.put_if_absent(name, data) and not _same_rows(storage.read(name), data):
            raise StorageError(f"{join(storage.uri, name)} is not of this run's input; give another output.path.")
        published.append(_published(storage, name))
    local.folder.cleanup()
    return published


def find_parts(storage: Storage) -> list[FileSlice]:
    """The parts that are published under this output, up to the first that is missing."""
    names = {entry.name for entry in storage.list(INPUT)}
    found: list[FileSlice] = []
    while (name := part_name(len(found))) in names:
        found.append(_published(storage, name))
    return found


def _published(storage: Storage, name: str) -> FileSlice:
    try:
        with storage.open(name) as stream:
            return read_footer(stream, join(storage.uri, name), is_part=True)[0]
    except InputError as error:
        raise StorageError(f"{str(error).rstrip('.')}; delete it and run the same command again.") from error


def _same_rows(present: bytes, data: bytes) -> bool:
    """Whether two parts hold the same rows: another version of pyarrow may write them in other bytes."""
    if present == data:
        return True
    try:
        return bool(read_table(present).equals(read_table(data)))
    except (pa.ArrowException, OSError):
        return False
