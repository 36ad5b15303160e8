"""The rows of a text file (txt, jsonl, csv), in one pass that hashes what it reads."""

import codecs
import csv
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from skipvar.errors import InputError, RowError
from skipvar.shards.columns import parse_json
from skipvar.shards.inputs import InputFile

MAX_LINE_BYTES = 64 << 20

RawRow = dict[str, Any] | RowError
"""A row's values by column, or what is wrong with the row."""


class TextRows:
    """One pass over a text file: iterating gives its rows in order. `InputError` names the line or byte at fault."""

    def __init__(self, stream: BinaryIO, file: InputFile, prompt_column: str) -> None:
        """`stream`: the file, open at its start. Reads the header of a csv file."""
        self._stream = stream
        self._uri = file.uri
        self._prompt_column = prompt_column
        self._sha256 = hashlib.sha256()
        self.header: Sequence[str] = ()
        """Column names of a csv file."""
        if file.format == "csv":
            records = _records(self._texts(), file.uri)
            self.header = _read_header(records, file.uri)
            self._rows = self._read_csv(records)
        else:
            self._rows = self._read_txt() if file.format == "txt" else self._read_jsonl()

    @property
    def num_bytes(self) -> int:
        """Bytes read so far."""
        return self._stream.tell()

    def sha256(self) -> str:
        """Of all bytes read so far, in hex: the whole file, or up to the last row that was asked for."""
        return self._sha256.hexdigest()

    def __iter__(self) -> Iterator[RawRow]:
        return self._rows

    def _read_txt(self) -> Iterator[RawRow]:
        for text in self._texts(skip_blank=True):
            yield {self._prompt_column: text.rstrip("\r\n")}

    def _read_jsonl(self) -> Iterator[RawRow]:
        for text in self._texts(skip_blank=True):
            try:
                yield parse_json(text)
            except RowError as error:
                yield error

    def _read_csv(self, records: Iterator[list[str]]) -> Iterator[RawRow]:
        for record in records:
            if len(record) == len(self.header):
                yield dict(zip(self.header, record, strict=True))
            elif record:
                yield RowError(f"the row has {len(record)} fields; the header has {len(self.header)}")

    def _texts(self, *, skip_blank: bool = False) -> Iterator[str]:
        """The lines with their ends, without a byte order mark."""
        try:
            if self._stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
                self._sha256.update(codecs.BOM_UTF8)
            else:
                self._stream.seek(0)
            while line := self._stream.readline(MAX_LINE_BYTES):
                self._sha256.update(line)
                if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                    raise InputError(
                        f"{self._uri} has a line of more than {MAX_LINE_BYTES >> 20} MiB; it is no file of prompts."
                    )
                if not (skip_blank and line.isspace()):
                    yield self._decoded(line)
        except OSError as error:
            raise InputError(f"{self._uri} cannot be read: {error.strerror or error}.") from error

    def _decoded(self, line: bytes) -> str:
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            at = self.num_bytes - len(line) + error.start
            raise InputError(f"{self._uri} is not UTF-8 at byte {at}; convert it to UTF-8.") from error


def _records(lines: Iterator[str], uri: str) -> Iterator[list[str]]:
    """The records of a csv file. A quoted field that is not closed as it should be would swallow the rows after it:
    `InputError` names the line where its record begins.

    A mark that ends a field too early (`"a" b`) is read leniently within one line, as `csv` does.
    """
    raw: list[str] = []  # the lines of the record that is being read

    def kept() -> Iterator[str]:
        for line in lines:
            raw.append(line)
            yield line
        raw.append("")  # the end of the file is no end of a line: what is open then is looked at

    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(kept())
    while True:
        raw.clear()
        first_line = reader.line_num + 1
        try:
            record = next(reader)
            if len(raw) > 1 or not raw[-1].endswith("\n"):
                _check_quotes(raw)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{uri}, line {first_line}: {_explained(str(error))}.") from error
        yield record


def _check_quotes(raw: Sequence[str]) -> None:
    """Read a record's lines again, strictly; csv.Error where a field is not closed, or not properly over lines."""
    try:
        for _ in csv.reader(iter(raw), strict=True):
            pass
    except csv.Error as error:
        is_one_line = len([text for text in raw if text]) == 1
        if "end of data" in str(error) or not is_one_line:
            raise


def _explained(reason: str) -> str:
    """What a user can do about an error of `csv`."""
    if "new-line" in reason:
        return "a carriage return stands alone within a line; end lines by a line feed"
    if "field limit" in reason or "end of data" in reason:
        return "a field begins with a quotation mark and is not closed; close it, or remove the mark"
    return (
        "a quoted field goes on over several lines and is not closed properly; close it, and write a quotation mark "
        "within a field twice"
    )


def _read_header(records: Iterator[list[str]], uri: str) -> Sequence[str]:
    record = next((record for record in records if record), None)
    if record is None:
        raise InputError(f"{uri} is empty; a csv file starts with a line of column names.")
    header = [name.strip() for name in record]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(f"{uri}: the column {twice[0][:40]!r} stands twice in the header; names must differ.")
    if "" in header:
        raise InputError(f"{uri}: column {header.index('') + 1} of the header has no name.")
    return header
