"""The rows of a text file (txt, jsonl, csv), in one pass that hashes what it reads."""

import codecs
import csv
import hashlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from skipvar.errors import InputError, RowError
from skipvar.shards.columns import parse_json

MAX_LINE_BYTES = 64 << 20
_FLUSH_BYTES = 1 << 20

RawRow = dict[str, Any] | RowError
"""A row's values by column, or what is wrong with the row."""


class TextRows:
    """One pass over a text file: iterating gives its rows in order. `InputError` names the line or byte at fault."""

    def __init__(self, stream: BinaryIO, uri: str, format: str, prompt_column: str) -> None:
        """`format`: txt, jsonl or csv. Reads the header of a csv file."""
        self._uri = uri
        self._format = format
        self._prompt_column = prompt_column
        self._lines = _Lines(stream, uri)
        self._records = _Records(self._lines, uri) if format == "csv" else None
        self.header: tuple[str, ...] = () if self._records is None else self._read_header(self._records)
        """Column names of a csv file."""

    @property
    def num_bytes(self) -> int:
        """Bytes read so far."""
        return self._lines.num_bytes

    def sha256(self) -> str:
        """Of all bytes read so far, in hex: the whole file, or up to the last row that was asked for."""
        return self._lines.sha256()

    def __iter__(self) -> Iterator[RawRow]:
        return {"txt": self._read_txt, "jsonl": self._read_jsonl, "csv": self._read_csv}[self._format]()

    def _read_txt(self) -> Iterator[RawRow]:
        for line in self._lines:
            if not line.isspace():
                yield {self._prompt_column: self._lines.decode(line).rstrip("\r\n")}

    def _read_jsonl(self) -> Iterator[RawRow]:
        for line in self._lines:
            if not line.isspace():
                text = self._lines.decode(line)
                try:
                    yield parse_json(text)
                except RowError as error:
                    yield error

    def _read_csv(self) -> Iterator[RawRow]:
        assert self._records is not None
        for record in self._records:
            if len(record) == len(self.header):
                yield dict(zip(self.header, record, strict=True))
            elif record:
                yield RowError(f"the row has {len(record)} fields; the header has {len(self.header)}")

    def _read_header(self, records: "_Records") -> tuple[str, ...]:
        for record in records:
            if record:
                return _checked_header(record, self._uri)
        raise InputError(f"{self._uri} is empty; a csv file starts with a line of column names.")


class _Lines:
    """The lines of a file with their ends, without a byte order mark; counts and hashes the bytes."""

    def __init__(self, stream: BinaryIO, uri: str) -> None:
        self._stream = stream
        self._uri = uri
        self._sha256 = hashlib.sha256()
        self._unhashed: list[bytes] = []
        self._num_unhashed = 0
        self.num_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        try:
            if self.num_bytes == 0:
                self._skip_mark()
            while line := self._stream.readline(MAX_LINE_BYTES):
                self._take(line)
                if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                    raise InputError(
                        f"{self._uri} has a line of more than {MAX_LINE_BYTES >> 20} MiB; it is no file of prompts."
                    )
                yield line
        except OSError as error:
            raise InputError(f"{self._uri} cannot be read: {error.strerror or error}.") from error

    def decode(self, line: bytes) -> str:
        """The text of the line that was given out last."""
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            at = self.num_bytes - len(line) + error.start
            raise InputError(f"{self._uri} is not UTF-8 at byte {at}; convert it to UTF-8.") from error

    def sha256(self) -> str:
        self._hash()
        return self._sha256.hexdigest()

    def _skip_mark(self) -> None:
        start = self._stream.read(len(codecs.BOM_UTF8))
        if start == codecs.BOM_UTF8:
            self._take(start)
        else:
            self._stream.seek(0)

    def _take(self, data: bytes) -> None:
        self.num_bytes += len(data)
        self._unhashed.append(data)
        self._num_unhashed += len(data)
        if self._num_unhashed >= _FLUSH_BYTES:
            self._hash()

    def _hash(self) -> None:
        self._sha256.update(b"".join(self._unhashed))
        self._unhashed.clear()
        self._num_unhashed = 0


class _Records:
    """The records of a csv file. A quoted field that is not closed as it should be would swallow the rows after it:
    `InputError` names the line where its record begins.

    A mark that ends a field too early (`"a" b`) is read leniently within one line, as `csv` does.
    """

    def __init__(self, lines: _Lines, uri: str) -> None:
        self._lines = lines
        self._uri = uri
        self._raw: list[str] = []
        """The lines of the record that is being read."""
        csv.field_size_limit(MAX_LINE_BYTES)
        self._reader = csv.reader(self._texts())

    def __iter__(self) -> Iterator[list[str]]:
        while True:
            self._raw = []
            first_line = self._reader.line_num + 1
            try:
                record = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise InputError(self._refusal(first_line, str(error))) from error
            if len(self._raw) > 1 or not self._raw[-1].endswith("\n"):
                self._check_quotes(self._raw, first_line)
            yield record

    def _texts(self) -> Iterator[str]:
        for line in self._lines:
            text = self._lines.decode(line)
            self._raw.append(text)
            yield text
        self._raw.append("")  # the end of the file is no end of a line: what is open then is looked at

    def _check_quotes(self, raw: list[str], first_line: int) -> None:
        """Read the record again, strictly."""
        is_one_line = len([text for text in raw if text]) == 1
        try:
            for _ in csv.reader(iter(raw), strict=True):
                pass
        except csv.Error as error:
            if "end of data" in str(error) or not is_one_line:
                raise InputError(self._refusal(first_line, str(error))) from error

    def _refusal(self, line: int, reason: str) -> str:
        if "new-line" in reason:
            problem = "a carriage return stands alone within a line; end lines by a line feed"
        elif "field limit" in reason or "end of data" in reason:
            problem = "a field begins with a quotation mark and is not closed; close it, or remove the mark"
        else:
            problem = (
                "a quoted field goes on over several lines and is not closed properly; close it, and write a quotation "
                "mark within a field twice"
            )
        return f"{self._uri}, line {line}: {problem}."


def _checked_header(record: list[str], uri: str) -> tuple[str, ...]:
    header = tuple(name.strip() for name in record)
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(f"{uri}: the column {twice[0][:40]!r} stands twice in the header; names must differ.")
    if "" in header:
        raise InputError(f"{uri}: column {header.index('') + 1} of the header has no name.")
    return header
