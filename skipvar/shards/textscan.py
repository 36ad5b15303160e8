"""One streaming pass over a text file: where its units start, what its bytes hash to, what its first rows look like."""

import array
import codecs
import csv
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from skipvar.errors import InputError

MAX_LINE_BYTES = 64 << 20
SAMPLE_ROWS = 10_000
_SAMPLE_BYTES = 32 << 20
_FLUSH_BYTES = 1 << 20


@dataclass(frozen=True)
class TextScan:
    """What a plan keeps of a text file: two numbers a unit."""

    num_rows: int
    cuts: np.ndarray
    """`(segments + 1,)` int64: the byte at which each segment starts, and the end of the last one. A segment is the
    part of a unit that lies in this file."""
    checksums: np.ndarray
    """`(segments,)` uint32: CRC-32 of each segment's bytes."""
    sha256: str
    """Of all bytes that were read: the whole file, or up to the last row that `input.limit` lets in."""
    header: tuple[str, ...] | None
    """Column names of a csv file."""
    sample: list[Any] = field(repr=False)
    """The first rows: lines (bytes) of txt and jsonl, records (lists of text) of csv."""


class _Segments:
    """Adds up lines into segments of so many rows, without keeping them."""

    def __init__(self, rows_to_first_cut: int, rows_per_unit: int, uri: str) -> None:
        self._until_cut = rows_to_first_cut
        self._rows_per_unit = rows_per_unit
        self._uri = uri
        self._lines: list[bytes] = []
        self._pending_bytes = 0
        self._offset = 0
        self._crc = 0
        self._sha256 = hashlib.sha256()
        self._cuts = array.array("q", [0])
        self._checksums = array.array("Q")
        self.num_rows = 0

    def add(self, line: bytes) -> None:
        self._lines.append(line)
        self._pending_bytes += len(line)
        if self._pending_bytes >= _FLUSH_BYTES:
            self._flush()

    def skip(self) -> None:
        """What was added so far is a head (byte order mark, csv header), not rows: the first segment starts here."""
        self._flush()
        self._crc = 0
        self._cuts[0] = self._offset

    def end_row(self) -> None:
        self.num_rows += 1
        self._until_cut -= 1

    def cut_if_full(self) -> None:
        """Called before a row is added: closes the segment whose rows are complete."""
        if self._until_cut == 0:
            self._close()
            self._until_cut = self._rows_per_unit

    def finish(self, header: tuple[str, ...] | None, sample: list[Any]) -> TextScan:
        if self.num_rows:
            self._close()
        else:
            self._flush()
        return TextScan(
            num_rows=self.num_rows,
            cuts=np.frombuffer(self._cuts, dtype=np.int64),
            checksums=np.frombuffer(self._checksums, dtype=np.uint64).astype(np.uint32),
            sha256=self._sha256.hexdigest(),
            header=header,
            sample=sample,
        )

    def _close(self) -> None:
        self._flush()
        self._cuts.append(self._offset)
        self._checksums.append(self._crc)
        self._crc = 0

    def _flush(self) -> None:
        blob = b"".join(self._lines)
        _check_utf8(blob, self._offset, self._uri)
        self._crc = zlib.crc32(blob, self._crc)
        self._sha256.update(blob)
        self._offset += len(blob)
        self._lines.clear()
        self._pending_bytes = 0


def scan_lines(file: BinaryIO, uri: str, *, rows_to_first_cut: int, rows_per_unit: int, limit: int | None) -> TextScan:
    """Scan txt or jsonl: every line that is not blank is a row."""
    segments = _Segments(rows_to_first_cut, rows_per_unit, uri)
    sample: list[bytes] = []
    sampled_bytes = 0
    for line in _lines(file, uri, segments):
        blank = line.isspace()
        if not blank:
            if segments.num_rows == limit:
                break
            segments.cut_if_full()
        segments.add(line)
        if not blank:
            segments.end_row()
            if len(sample) < SAMPLE_ROWS and sampled_bytes < _SAMPLE_BYTES:
                sample.append(line)
                sampled_bytes += len(line)
    return segments.finish(None, sample)


def scan_csv(file: BinaryIO, uri: str, *, rows_to_first_cut: int, rows_per_unit: int, limit: int | None) -> TextScan:
    """Scan csv: a header, then records, whose quoted fields may hold line ends."""
    segments = _Segments(rows_to_first_cut, rows_per_unit, uri)
    sample: list[list[str]] = []
    sampled_characters = 0
    pending: list[bytes] = []

    def texts() -> Iterator[str]:
        for line in _lines(file, uri, segments):
            pending.append(line)
            yield line.decode(
                errors="surrogateescape"
            )  # bytes that are not UTF-8 are reported when the segment is summed

    def take() -> None:
        for line in pending:
            segments.add(line)
        pending.clear()

    header: tuple[str, ...] | None = None
    records = read_records(texts(), uri)
    for record in records:
        if header is None:
            if record:
                header = _checked_header(record, uri)
            take()
            segments.skip()
            continue
        if record:
            if segments.num_rows == limit:
                pending.clear()
                break
            segments.cut_if_full()
        take()
        if record:
            segments.end_row()
            if len(sample) < SAMPLE_ROWS and sampled_characters < _SAMPLE_BYTES:
                sample.append(record)
                sampled_characters += sum(map(len, record))
    if header is None:
        raise InputError(f"{uri} is empty; a csv file starts with a line of column names.")
    take()
    return segments.finish(header, sample)


def read_records(lines: Iterator[str], uri: str) -> Iterator[list[str]]:
    """The csv records of lines of text; `InputError` names the line where the quoting goes wrong."""
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(lines)
    try:
        yield from reader
    except csv.Error as error:
        raise InputError(f"{uri}, line {reader.line_num}: {error}; is a quotation mark missing?") from error


def _check_utf8(data: bytes, offset: int, uri: str) -> None:
    """`InputError` with file and byte where `data`, which starts at `offset` of the file, is not UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{uri} is not UTF-8 at byte {offset + error.start}; convert it to UTF-8.") from error


def _lines(file: BinaryIO, uri: str, segments: _Segments) -> Iterator[bytes]:
    """The lines with their ends; the byte order mark at the start is taken away and counted as head."""
    try:
        start = file.read(3)
        if start == codecs.BOM_UTF8:
            segments.add(start)
            segments.skip()
        else:
            file.seek(0)
        while line := file.readline(MAX_LINE_BYTES):
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                raise InputError(f"{uri} has a line of more than {MAX_LINE_BYTES >> 20} MiB; it is no file of prompts.")
            yield line
    except OSError as error:
        raise InputError(f"{uri} cannot be read: {error.strerror}.") from error


def _checked_header(record: list[str], uri: str) -> tuple[str, ...]:
    header = tuple(name.strip() for name in record)
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(f"{uri}: the column '{twice[0]}' stands twice in the header; names must differ.")
    if "" in header:
        raise InputError(f"{uri}: column {header.index('') + 1} of the header has no name.")
    return header
