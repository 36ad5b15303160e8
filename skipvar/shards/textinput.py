"""Text inputs (txt, jsonl, csv): one pass that brings their rows into the normal form (`skipvar.shards.parts`)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from skipvar.errors import RowError, first_line
from skipvar.shards.columns import UNFIT_ERRORS, fit_csv, fit_json
from skipvar.shards.inputs import InputFile, Inputs
from skipvar.shards.parts import PartWriter
from skipvar.shards.rows import (
    MAX_ROW_BYTES,
    SETTINGS,
    InputSpec,
    RowReader,
    approximate_bytes,
    check_size,
    id_text,
    is_empty,
    shown_prompt,
)
from skipvar.shards.textrows import RawRow, TextRows


@dataclass(frozen=True)
class NormalFile:
    """A text file that was brought into its normal form: its rows among those of all parts."""

    first_row: int
    num_rows: int
    sha256: str
    """Of the whole file, or up to the last row that `input.limit` lets in."""


class TextNormaliser:
    """Writes the rows of text files into parts, each checked and in the plan's types."""

    def __init__(self, spec: InputSpec, columns: Sequence[str]) -> None:
        """`columns`: which of the prompt's, the id's and the settings' columns the files may have."""
        self._spec = spec
        self._reader = RowReader(spec)
        types = {**SETTINGS, spec.input.id_column: pa.string(), spec.input.prompt_column: pa.string()}
        self._special = list(columns)
        self._own = list(spec.columns)
        self._own_names = spec.columns.names
        self._nothing = dict.fromkeys(self._special)
        self._parts = PartWriter(pa.schema([*((name, types[name]) for name in self._special), *spec.columns]))
        self.finish = self._parts.finish

    def add(self, inputs: Inputs, file: InputFile, limit: int | None) -> NormalFile:
        """Take the rows of a file, the first `limit` of them at most."""
        first_row = self._parts.num_rows
        with inputs.open(file.uri) as stream:
            rows = TextRows(stream, file, self._spec.input.prompt_column)
            name = file.name
            for number, row in enumerate(islice(rows, limit), start=1):
                values, own, error = self._normal(file.format, row)
                columns = [values[key] for key in self._special]
                if self._own_names:
                    columns += [own.get(key) for key in self._own_names]
                self._parts.add([error, name, number, *columns], sum(map(approximate_bytes, columns)))
            return NormalFile(first_row, self._parts.num_rows - first_row, rows.sha256())

    def _normal(self, format: str, row: RawRow) -> tuple[dict[str, Any], dict[str, Any], str | None]:
        """The special columns' values, the user's own, and what is wrong with the row."""
        if isinstance(row, RowError):
            return {**self._nothing, self._spec.input.prompt_column: ""}, {}, str(row)
        own: dict[str, Any] = {}
        fit = fit_csv if format == "csv" else fit_json
        try:
            special = self._settings(row)
            check_size(row)
            for field in self._own:
                own[field.name] = fit(row.get(field.name), field)
            return special, own, None
        except RowError as error:
            reason = str(error)
        except UNFIT_ERRORS as error:
            reason = f"the row cannot be used ({first_line(error)})"
        return {**self._nothing, **self._shown(row)}, own, reason

    def _settings(self, row: dict[str, Any]) -> dict[str, Any]:
        spec = self._spec
        if len(self._special) == 1:  # txt: nothing but the prompt
            prompt = row[spec.input.prompt_column]
            if not prompt.isspace() and len(prompt) < MAX_ROW_BYTES // 4:
                return row
        settings = self._reader.settings(row)
        values = {
            "seed": settings.seed,
            "cfg": _setting_text(row.get("cfg")),
            "tau": _setting_text(row.get("tau")),
            "negative_prompt": row.get("negative_prompt"),
            "aspect_ratio": None if is_empty(row.get("aspect_ratio")) else settings.aspect_ratio,
        }
        return {**values, **self._labels(row), spec.input.prompt_column: settings.prompt}

    def _shown(self, row: dict[str, Any]) -> dict[str, Any]:
        """What the error table tells of a row that cannot be used."""
        return {
            **self._labels(row),
            self._spec.input.prompt_column: shown_prompt(row.get(self._spec.input.prompt_column)),
        }

    def _labels(self, row: dict[str, Any]) -> dict[str, Any]:
        id = row.get(self._spec.input.id_column)
        text = None if is_empty(id) else id_text(id)
        return {self._spec.input.id_column: None if text is None else text.encode("utf-8", "replace").decode()}


def _setting_text(value: Any) -> str | None:
    if is_empty(value):
        return None
    return value.strip() if isinstance(value, str) else json.dumps(value)
