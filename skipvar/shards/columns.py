"""The user's own columns in text formats: their types from the first rows, and whether a later row's value fits."""

import json
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from skipvar.errors import RowError
from skipvar.shards.schema import JSON_TEXT

_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_INT64 = range(-(2**63), 2**63)


def parse_json(line: bytes) -> dict[str, Any]:
    """The object of a jsonl line; RowError tells what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RowError(f"the line is no valid JSON ({_short(str(error))})") from None
    if not isinstance(row, dict):
        raise RowError(f'the line must be a JSON object, such as {{"prompt": "..."}}, not {_kind(row)}')
    return row


def infer_csv(header: Sequence[str], records: Sequence[list[str]], own: Sequence[str]) -> pa.Schema:
    """Types of a csv file's own columns: int64, float64, bool or string, as all the first rows' values are."""
    fields = []
    for name in own:
        at = header.index(name)
        values = [record[at] for record in records if len(record) == len(header) and record[at] != ""]
        fields.append(pa.field(name, _csv_type(values)))
    return pa.schema(fields)


def infer_json(rows: Sequence[dict[str, Any]], own: Sequence[str]) -> pa.Schema:
    """Types of a jsonl file's own columns, nested ones too; a column without a common type is kept as JSON text."""
    fields = []
    for name in own:
        try:
            kind = pa.array([row.get(name) for row in rows]).type
        except (pa.ArrowException, OverflowError, ValueError, TypeError, RecursionError):
            kind = None
        if kind is None or not _is_storable(kind):
            fields.append(pa.field(name, pa.string(), metadata=JSON_TEXT))
        else:
            fields.append(pa.field(name, kind))
    return pa.schema(fields)


def fit_csv(text: str, field: pa.Field) -> Any:
    """A csv value as its column's type; empty is null. RowError where it does not fit."""
    if text == "":
        return None
    kind = field.type
    if pa.types.is_integer(kind) and _INTEGER.fullmatch(text) and int(text) in _INT64:
        return int(text)
    if pa.types.is_floating(kind) and _DECIMAL.fullmatch(text):
        return float(text)
    if pa.types.is_boolean(kind) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if pa.types.is_string(kind):
        return checked_text(text, field.name)
    raise RowError(f"column '{field.name}' is {text[:40]!r} here, but {kind} in the input's first rows")


def fit_json(value: Any, field: pa.Field) -> Any:
    """A jsonl value as its column's type. RowError where it does not fit."""
    if value is None:
        return None
    if field.metadata == JSON_TEXT:
        return checked_text(json.dumps(value, ensure_ascii=False), field.name)
    return _fit(value, field.type, field.name)


def checked_text(text: str, column: str) -> str:
    """The text, if it can be written as UTF-8 (JSON may hold halves of surrogate pairs, which cannot)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError(f"column '{column}' holds half of a surrogate pair, which is no valid text") from None
    return text


def _fit(value: Any, kind: pa.DataType, column: str) -> Any:
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if pa.types.is_string(kind) and isinstance(value, str):
        return checked_text(value, column)
    if pa.types.is_boolean(kind) and isinstance(value, bool):
        return value
    if pa.types.is_integer(kind) and is_number and isinstance(value, int) and value in _INT64:
        return value
    if pa.types.is_floating(kind) and is_number:
        return float(value)
    if pa.types.is_list(kind) and isinstance(value, list):
        return [_fit(item, kind.value_type, column) for item in value]
    if pa.types.is_struct(kind) and isinstance(value, dict):
        known = {child.name: child.type for child in kind}
        if set(value) <= set(known):
            return {name: _fit(item, known[name], column) for name, item in value.items()}
        raise RowError(
            f"column '{column}' has the key '{min(set(value) - set(known))}', which the input's first rows lack"
        )
    raise RowError(f"column '{column}' is {_kind(value)} here, but {kind} in the input's first rows")


def _csv_type(values: Sequence[str]) -> pa.DataType:
    if not values:
        return pa.null()
    if all(_INTEGER.fullmatch(value) and int(value) in _INT64 for value in values):
        return pa.int64()
    if all(_DECIMAL.fullmatch(value) for value in values):
        return pa.float64()
    if all(value.lower() in ("true", "false") for value in values):
        return pa.bool_()
    return pa.string()


def _is_storable(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.num_fields > 0 and all(_is_storable(child.type) for child in kind)
    if pa.types.is_list(kind):
        return _is_storable(kind.value_type)
    return True


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "..."
