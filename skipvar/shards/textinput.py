"""Text inputs (txt, jsonl, csv) in their normal form: typed Parquet parts, made in one pass and published once."""

import json
import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from skipvar.errors import InputError, RowError, StorageError
from skipvar.shards.columns import fit_csv, fit_json
from skipvar.shards.inputs import InputFile, Inputs
from skipvar.shards.rows import (
    MAX_ROW_BYTES,
    SETTINGS,
    InputSpec,
    approximate_bytes,
    is_empty,
    label_of,
    row_settings,
    shown_prompt,
)
from skipvar.shards.sources import HIDDEN, open_parquet
from skipvar.shards.storage import Storage, explain_os_error, join
from skipvar.shards.textrows import RawRow, TextRows
from skipvar.shards.unitfile import read_table
from skipvar.types import FileSlice

INPUT = "_input/"
ROW_GROUP_ROWS, ROW_GROUP_BYTES = 4096, 1 << 20
"""Small, so that reading a unit's few rows is cheap."""
PART_ROWS, PART_BYTES = 1 << 20, 64 << 20
"""A part is published by one upload from memory. Borders are drawn by rows and raw bytes: the same input gives the same
parts, whatever the compression makes of them."""
_ROW_OVERHEAD_BYTES = 32


class TextNormaliser:
    """Writes the rows of text files into parts, each checked and in the plan's types."""

    def __init__(self, spec: InputSpec, columns: Sequence[str]) -> None:
        """`columns`: which of the prompt's, the id's and the settings' columns the files may have."""
        self._spec = spec
        types = {**SETTINGS, spec.input.id_column: pa.string(), spec.input.prompt_column: pa.string()}
        schema = pa.schema([*((name, types[name]) for name in columns), *spec.columns])
        self._names = schema.names
        self._own = list(spec.columns)
        self._only_prompts = len(columns) == 1
        self._writer = _PartWriter(schema)

    @property
    def folder(self) -> "tempfile.TemporaryDirectory[str]":
        """Where the parts lie; it goes when nobody refers to it any more."""
        return self._writer.folder

    def add(self, inputs: Inputs, file: InputFile, limit: int) -> tuple[int, str]:
        """Take the rows of a file, the first `limit` of them at most. Their number, and the SHA-256 of the whole file,
        or up to the last row that `limit` lets in."""
        number, name = 0, file.name
        fit = fit_csv if file.format == "csv" else fit_json
        with inputs.open(file.uri) as stream:
            rows = TextRows(stream, file, self._spec.input.prompt_column)
            for number, row in enumerate(islice(rows, limit), start=1):
                values, error = self._normal(row, fit)
                columns = [values.get(key) for key in self._names]
                self._writer.add([error, name, number, *columns], sum(map(approximate_bytes, columns)))
            return number, rows.sha256()

    def finish(self) -> Sequence[FileSlice]:
        """All parts, whole files; to be called after the last file."""
        return self._writer.finish()

    def _normal(self, row: RawRow, fit: Callable[[Any, pa.Field], Any]) -> tuple[dict[str, Any], str | None]:
        """The values of the part's columns (None where there is none), and what is wrong with the row."""
        prompt_column = self._spec.input.prompt_column
        if isinstance(row, RowError):
            return {prompt_column: ""}, str(row)
        own: dict[str, Any] = {}
        try:
            settings = self._settings(row)
            for field in self._own:
                own[field.name] = fit(row.get(field.name), field)
            return settings | own, None
        except RowError as error:
            label = label_of(row, self._spec.input.id_column)
            shown = {self._spec.input.id_column: label, prompt_column: shown_prompt(row.get(prompt_column))}
            return own | shown, str(error)

    def _settings(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row's columns that are not the user's own. RowError where one is bad."""
        names = self._spec.input
        if self._only_prompts:  # the checks of a txt would take as long as the rest
            is_small = sum(map(approximate_bytes, row.values())) <= MAX_ROW_BYTES
            if is_small and not row[names.prompt_column].isspace():
                return row
        settings = row_settings(row, self._spec)
        return {
            "seed": settings.seed,
            "cfg": _setting_text(row.get("cfg")),
            "tau": _setting_text(row.get("tau")),
            "negative_prompt": row.get("negative_prompt"),
            "aspect_ratio": None if is_empty(row.get("aspect_ratio")) else settings.aspect_ratio,
            names.id_column: label_of(row, names.id_column),
            names.prompt_column: settings.prompt,
        }


class _PartWriter:
    """Writes rows into parts in a local folder; holds one row group in memory."""

    def __init__(self, schema: pa.Schema) -> None:
        """`schema`: the rows' columns, the hidden ones not among them."""
        self._schema = pa.schema([*(pa.field(*pair) for pair in HIDDEN), *schema])
        self._rows: list[Sequence[Any]] = []
        self._group_bytes = self._part_bytes = self._part_rows = 0
        self._writer: pq.ParquetWriter | None = None
        self._parts: list[FileSlice] = []
        try:
            self.folder = tempfile.TemporaryDirectory(prefix="skipvar-input-")
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

    def finish(self) -> Sequence[FileSlice]:
        """Write what is still in memory and end the last part; all of them, in the order of their rows."""
        self._flush()
        self._end_part()
        return self._parts

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
                part, _ = open_parquet(stream, self._path(), is_part=True)
        except OSError as error:
            raise self._explained(error) from error
        self._parts.append(part)
        self._writer = None
        self._part_rows = self._part_bytes = 0

    def _path(self) -> str:
        return str(Path(self.folder.name) / _part_name(len(self._parts)))

    def _explained(self, error: OSError) -> StorageError:
        return explain_os_error(error, f"write {self._path()} (TMPDIR names another folder)")


def publish_parts(folder: str, storage: Storage) -> dict[str, FileSlice]:
    """Put the parts in a local folder beside the dataset: where each lies now, by its local path. Those that an earlier
    attempt published stay: their rows are the same.
    """
    published = {}
    for path in sorted(Path(folder).iterdir()):
        name, data = INPUT + path.name, path.read_bytes()
        if not storage.put_if_absent(name, data) and not _same_rows(storage.read(name), data):
            raise StorageError(f"{join(storage.uri, name)} is not of this run's input; give another output.path.")
        published[str(path)] = _published(storage, name)
    return published


def find_parts(storage: Storage) -> list[FileSlice]:
    """The parts that are published under this output, up to the first that is missing."""
    names = {entry.name for entry in storage.list(INPUT)}
    found: list[FileSlice] = []
    while (name := INPUT + _part_name(len(found))) in names:
        found.append(_published(storage, name))
    return found


def _published(storage: Storage, name: str) -> FileSlice:
    try:
        with storage.open(name) as stream:
            return open_parquet(stream, join(storage.uri, name), is_part=True)[0]
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


def _part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _setting_text(value: Any) -> str | None:
    if is_empty(value):
        return None
    return value.strip() if isinstance(value, str) else json.dumps(value)
