"""Text inputs (txt, jsonl, csv): one pass that brings their rows into the normal form (`skipvar.shards.parts`)."""

import json
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from skipvar.errors import RowError
from skipvar.shards.columns import fit_csv, fit_json
from skipvar.shards.inputs import InputFile, Inputs
from skipvar.shards.parts import LocalParts, PartWriter
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
from skipvar.shards.textrows import RawRow, TextRows


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
        self._parts = PartWriter(schema)

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
                self._parts.add([error, name, number, *columns], sum(map(approximate_bytes, columns)))
            return number, rows.sha256()

    def finish(self) -> LocalParts:
        """All parts, to be called after the last file."""
        return self._parts.finish()

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
        if self._only_prompts and len(row) == 1:  # txt: a third of the time that the checks take
            prompt = row[names.prompt_column]
            if not prompt.isspace() and len(prompt) < MAX_ROW_BYTES // 4:
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


def _setting_text(value: Any) -> str | None:
    if is_empty(value):
        return None
    return value.strip() if isinstance(value, str) else json.dumps(value)
