"""A unit's files: their names, their bytes, and what their footers say."""

import contextlib
import datetime
import decimal
import hashlib
import io
import json
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from skipvar.errors import StorageError
from skipvar.shards.rows import approximate_bytes
from skipvar.shards.schema import IMAGE_BYTES, SCHEMA_VERSION, UNHASHED
from skipvar.shards.storage import Storage
from skipvar.types import RequestKey

DATA = "data/"
ERRORS = "errors/"
_DATA_NAME = re.compile(r"data/unit-(\d{9})(?:\.retry-([1-9]\d*))?\.parquet")
_ERROR_NAME = re.compile(r"errors/unit-(\d{9})\.([1-9]\d*)\.parquet")
FileKey = tuple[int, int]
"""`(unit, retry)` of a data file; retry 0 is the unit itself."""
_PREFIX = "skipvar."
_ROW_OVERHEAD_BYTES = 500
_CHECKSUM = "skipvar.file_sha256"
_NO_CHECKSUM = "0" * 64


@dataclass(frozen=True, kw_only=True)
class UnitFooter:
    """What a data file's footer says of its unit."""

    unit: int
    retry: int
    rows: int
    content_hash: str
    fingerprint: str
    schema_version: int = SCHEMA_VERSION
    errors: str | None = None
    """Name of the error file that counts; None: no request failed."""
    error_rows: int = 0
    retried: frozenset[RequestKey] | None = None
    """Of a retry: the requests that it made again. Older error rows of these do not count any more."""
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    """The engine's time for its images, by phase."""
    audit_seconds: Mapping[str, float] = field(default_factory=dict)
    """The engine's time for its audited images: `made` as decided, and `base`."""

    def to_metadata(self) -> dict[str, str]:
        """Each field as text under `skipvar.<field>`, for the file's key-value metadata; `from_metadata` reads it."""
        retried = None if self.retried is None else sorted(self.retried)
        values = {**self.__dict__, "retried": json.dumps(retried)}
        values |= {name: json.dumps(dict(values[name])) for name in ("phase_seconds", "audit_seconds")}
        return {_PREFIX + name: "" if value is None else str(value) for name, value in values.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes]) -> "UnitFooter":
        """KeyError, TypeError or ValueError where it is not the footer of a unit."""
        mine = [key for key in metadata if key.startswith(_PREFIX.encode())]
        said = {key.decode().removeprefix(_PREFIX): metadata[key].decode() for key in mine}
        retried = json.loads(said["retried"])
        if said["errors"] and parse_error_name(said["errors"]) is None:
            raise ValueError("no error file has such a name")
        return cls(
            unit=int(said["unit"]),
            retry=int(said["retry"]),
            rows=int(said["rows"]),
            content_hash=said["content_hash"],
            fingerprint=said["fingerprint"],
            schema_version=int(said["schema_version"]),
            errors=said["errors"] or None,
            error_rows=int(said["error_rows"]),
            retried=None if retried is None else frozenset((position, index) for position, index in retried),
            phase_seconds=json.loads(said.get("phase_seconds", "{}")),
            audit_seconds=json.loads(said.get("audit_seconds", "{}")),
        )


def data_name(unit: int, retry: int = 0) -> str:
    """`data/unit-N.parquet`, of a retry `data/unit-N.retry-R.parquet`; `parse_data_name` reads it."""
    return f"{DATA}unit-{unit:09d}" + (f".retry-{retry}" if retry else "") + ".parquet"


def error_name(unit: int, attempt: int) -> str:
    """`errors/unit-N.<attempt>.parquet`; `parse_error_name` reads it."""
    return f"{ERRORS}unit-{unit:09d}.{attempt}.parquet"


def parse_data_name(name: str) -> FileKey | None:
    """(unit, retry) of a data file; None for any other name."""
    found = _DATA_NAME.fullmatch(name)
    return (int(found[1]), int(found[2] or 0)) if found else None


def parse_error_name(name: str) -> tuple[int, int] | None:
    """(unit, attempt) of an error file; None for any other name."""
    found = _ERROR_NAME.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else None


def data_files(storage: Storage) -> Iterator[tuple[FileKey, str]]:
    """The data files that are published, in the order of their names; other names are none."""
    for entry in storage.list(DATA):
        if (key := parse_data_name(entry.name)) is not None:
            yield key, entry.name


def unit_files(storage: Storage, units: Container[int]) -> dict[int, list[int]]:
    """The files that are there of some units: of each the numbers of its retries in order, 0 for the unit itself."""
    found: dict[int, list[int]] = defaultdict(list)
    for (unit, retry), _ in data_files(storage):
        if unit in units:
            found[unit].append(retry)
    return {unit: sorted(found[unit]) for unit in sorted(found)}


class ContentHash:
    """A hash of rows that does not depend on row groups, compression or who made them."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def update(self, batch: pa.RecordBatch) -> None:
        """Take in rows, in their order, without the columns of who made them and when (`UNHASHED`)."""
        names = [name for name in batch.schema.names if name not in UNHASHED]
        for row in batch.select(names).to_pylist():
            self._sha256.update(json.dumps(row, default=_canonical, sort_keys=True).encode())
            self._sha256.update(b"\n")

    def hexdigest(self) -> str:
        """SHA-256 of the rows so far, in 64 hexadecimal digits."""
        return self._sha256.hexdigest()


class UnitFile:
    """A Parquet file in memory: small columns compressed, images as they are, page index written.

    Its footer holds a SHA-256 of the whole file (taken with zeros in place of itself): pages have checksums of their
    own, but statistics and indexes, by which readers skip pages, have none.
    """

    def __init__(self, schema: pa.Schema, rows: Iterable[dict[str, Any]], max_row_group_bytes: int) -> None:
        """`rows` have a value for each column; they are let go as they are taken."""
        self._sink = io.BytesIO()
        leaves = [path for path in _leaf_paths(schema) if path != IMAGE_BYTES]
        self._writer = pq.ParquetWriter(
            self._sink,
            schema,
            compression={**dict.fromkeys(leaves, "zstd"), IMAGE_BYTES: "none"},
            use_dictionary=leaves,
            write_statistics=leaves,
            write_page_index=True,
            write_batch_size=1,  # else a page ends after 1,024 images at the soonest, and the index finds none of them
            write_page_checksum=True,
        )

        content = ContentHash()
        for batch in _row_groups(rows, schema, max_row_group_bytes):
            content.update(batch)
            self._writer.write_batch(batch, row_group_size=batch.num_rows)
        self.content_hash = content.hexdigest()

    def finish(self, metadata: Mapping[str, str]) -> bytes:
        """Close the file with `metadata` in its footer, and return its bytes with their checksum in place."""
        self._writer.add_key_value_metadata({**metadata, _CHECKSUM: _NO_CHECKSUM})
        self._writer.close()
        data = self._sink.getvalue()
        place = _checksum_place(data)
        assert place is not None
        return b"".join((data[: place.start], _checksum(data, place), data[place.stop :]))


def has_own_checksum(data: bytes) -> bool | None:
    """Whether a file's bytes are those that its checksum was taken of; None where it holds none."""
    place = _checksum_place(data)
    return None if place is None else _checksum(data, place) == data[place]


def _checksum(data: bytes, place: slice) -> bytes:
    """Of all the bytes, with zeros at its own place; in hexadecimal digits. Nothing of the file is copied."""
    view, digest = memoryview(data), hashlib.sha256()
    for part in (view[: place.start], _NO_CHECKSUM.encode(), view[place.stop :]):
        digest.update(part)
    return digest.hexdigest().encode()


def _checksum_place(data: bytes) -> slice | None:
    """Where the checksum's digits are: after the last place of its key, since rows come before the footer.

    Thrift's compact protocol has two bytes between key and value: a type, a length under 128.
    """
    key = data.rfind(_CHECKSUM.encode())
    start = key + len(_CHECKSUM) + 2
    return None if key < 0 else slice(start, start + len(_NO_CHECKSUM))


@contextlib.contextmanager
def readable(name: str) -> Iterator[None]:
    """Whatever a damaged file of a unit raises where it is read becomes a `StorageError` that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, SyntaxError, KeyError, ValueError, TypeError) as error:
        raise StorageError(
            f"{name} is not a readable unit of a dataset; `python -m jobs.verify OUTPUT --repair` says what to do."
        ) from error


@contextlib.contextmanager
def open_unit(storage: Storage, name: str, **options: Any) -> Iterator[pq.ParquetFile]:
    """A unit's file, of which only what is asked for is read. `StorageError` where it is damaged, wherever that shows.

    `options` are those of `pyarrow.parquet.ParquetFile`.
    """
    with (
        readable(f"{storage.uri}/{name}"),
        storage.open(name) as file,
        pq.ParquetFile(file, pre_buffer=False, **options) as parquet,
    ):
        yield parquet


def read_unit_footer(storage: Storage, name: str) -> UnitFooter:
    """The footer of a data file; `StorageError` where it is not one."""
    with open_unit(storage, name) as parquet:
        return UnitFooter.from_metadata(parquet.metadata.metadata or {})


def read_columns(storage: Storage, name: str, columns: Sequence[str]) -> pa.Table:
    """Columns of a unit's file; no others are read. Raises `StorageError`."""
    with open_unit(storage, name) as parquet:
        return parquet.read(columns=list(columns), use_threads=False)


def read_table(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, or some columns of it, by this thread alone.

    `pyarrow.parquet.read_table` reads by Arrow's threads: one that is not done at the interpreter's end aborts the
    process.
    """
    with pq.ParquetFile(pa.BufferReader(data), pre_buffer=False) as parquet:
        return parquet.read(columns=None if columns is None else list(columns), use_threads=False)


def _row_groups(rows: Iterable[dict[str, Any]], schema: pa.Schema, max_bytes: int) -> Iterator[pa.RecordBatch]:
    """The rows in batches of at most so many bytes (one row at least)."""
    waiting: list[dict[str, Any]] = []
    size, names = 0, set(schema.names)
    for row in rows:
        assert row.keys() == names, row.keys() ^ names  # Arrow would make nulls of what a row lacks
        added = approximate_bytes(row) + _ROW_OVERHEAD_BYTES
        if waiting and size + added > max_bytes:
            yield pa.RecordBatch.from_pylist(waiting, schema=schema)
            waiting, size = [], 0
        waiting.append(row)
        size += added
    if waiting:
        yield pa.RecordBatch.from_pylist(waiting, schema=schema)


def _canonical(value: Any) -> str:
    """Values that JSON lacks, as text that depends on the value alone."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta | decimal.Decimal):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__} cannot be hashed")


def _leaf_paths(schema: pa.Schema) -> list[str]:
    """Parquet's paths of the leaf columns, as the writer names them."""
    sink = io.BytesIO()
    pq.write_table(schema.empty_table(), sink)
    parquet = pq.ParquetFile(sink).schema
    return [parquet.column(at).path for at in range(len(parquet))]
