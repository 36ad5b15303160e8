"""The user's own columns in text formats: their types from the first rows, and whether a later row's value fits.

Whatever a cell holds, it fits, or its row is an error row (`RowError`), or its column is kept as text.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from skipvar.errors import RowError
from skipvar.shards.schema import JSON_TEXT

MAX_DEPTH = 32
"""Lists and objects within each other that a cell may hold: beyond, Python and Parquet give up one after the other."""
MAX_LEAVES = 256
"""Keys that the objects of a column may have in all; of more, the column is kept as JSON text."""
UNFIT_ERRORS = (ValueError, TypeError, ArithmeticError, RecursionError, pa.ArrowException)
"""What Python and Arrow raise for a value that they cannot take (`UnicodeError` and `OverflowError` among them)."""
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,18})", re.ASCII)
_DECIMAL = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?", re.ASCII)


def parse_json(line: str) -> dict[str, Any]:
    """The object of a jsonl line; RowError tells what is wrong with it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise RowError(f"the line is no valid JSON ({_short(str(error))})") from None
    except ValueError:
        raise RowError("the line holds a number of more digits than can be read") from None
    except RecursionError:
        raise RowError("the line is nested too deeply") from None
    if not isinstance(row, dict):
        raise RowError(f'the line must be a JSON object, such as {{"prompt": "..."}}, not {_kind(row)}')
    _check_nested(row)
    return row


def infer_csv(rows: Sequence[dict[str, str]], own: Sequence[str]) -> pa.Schema:
    """Types of a csv file's own columns: int64, float64, bool or string, as all the first rows' values are."""
    return pa.schema([(name, _csv_type([row[name] for row in rows if row[name] != ""])) for name in own])


def infer_json(rows: Sequence[dict[str, Any]], own: Sequence[str]) -> pa.Schema:
    """Types of a jsonl file's own columns, nested ones too; a column without a common type is kept as JSON text."""
    fields = []
    for name in own:
        try:
            kind = pa.array([row.get(name) for row in rows]).type
        except UNFIT_ERRORS:
            kind = None
        if kind is None or not _is_storable(_leaves(kind)):
            fields.append(pa.field(name, pa.string(), metadata=JSON_TEXT))
        else:
            fields.append(pa.field(name, kind))
    return pa.schema(fields)


def fit_csv(text: str | None, field: pa.Field) -> Any:
    """A csv value as its column's type; empty is null. RowError where it does not fit."""
    if not text:
        return None
    value = _csv_value(text, field.type)
    if value is None:
        raise _unlike(field.name, repr(text[:40]), field.type)
    return value


def fit_json(value: Any, field: pa.Field) -> Any:
    """A jsonl value as its column's type. RowError where it does not fit."""
    if value is None:
        return None
    if field.metadata == JSON_TEXT:
        return checked_text(json.dumps(value, ensure_ascii=False), field.name)
    return _fit(value, field.type, field.name)


def checked_text(text: str, name: str, of: str = "column") -> str:
    """The text, if it can be written as UTF-8 (JSON may hold halves of surrogate pairs, which cannot)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError(f"{of} {shown_name(name)} holds half of a surrogate pair, which is no valid text") from None
    return text


def shown_name(name: str) -> str:
    """A column's name or a key, quoted and cut, for a message."""
    return repr(name if len(name) <= 60 else name[:57] + "...")


def _fit(value: Any, kind: pa.DataType, column: str) -> Any:
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if pa.types.is_string(kind) and isinstance(value, str):
        return checked_text(value, column)
    if pa.types.is_boolean(kind) and isinstance(value, bool):
        return value
    if pa.types.is_integer(kind) and isinstance(value, int) and is_number and value in _whole_numbers(kind):
        return value
    if pa.types.is_floating(kind) and is_number:
        return _as_float(value, column)
    if pa.types.is_list(kind) and isinstance(value, list):
        return [_fit(item, kind.value_type, column) for item in value]
    if pa.types.is_struct(kind) and isinstance(value, dict):
        known = {child.name: child.type for child in kind}
        if set(value) <= set(known):
            return {name: _fit(item, known[name], column) for name, item in value.items()}
        raise RowError(
            f"column {shown_name(column)} has the key {shown_name(min(set(value) - set(known)))}, "
            "which the input's first rows lack"
        )
    raise _unlike(column, _kind(value), kind)


def _unlike(column: str, found: str, kind: pa.DataType) -> RowError:
    return RowError(f"column {shown_name(column)} is {found} here, but {_short(str(kind))} in the input's first rows")


def _whole_numbers(kind: pa.DataType) -> range:
    """Those that an integer type can hold. (A column of text input may have a Parquet file's narrower type.)"""
    bits: int = kind.bit_width
    return range(-(2 ** (bits - 1)), 2 ** (bits - 1)) if pa.types.is_signed_integer(kind) else range(2**bits)


def _as_float(value: float, column: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise RowError(f"column {shown_name(column)} holds a number that is too large for its type") from None


def _check_nested(row: dict[str, Any]) -> None:
    """RowError where a cell is nested too deeply or a key is no valid text; without recursion."""
    level: list[Any] = [row]
    for _ in range(1 + MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                for key in item:
                    checked_text(key, key, "the key")
                below += item.values()
            else:
                below += item
        level = [item for item in below if isinstance(item, dict | list)]
        if not level:
            return
    raise RowError(f"a value is nested more than {MAX_DEPTH} levels deep")


def _csv_type(values: Sequence[str]) -> pa.DataType:
    """The first type that all values have."""
    if not values:
        return pa.null()
    kinds = (pa.int64(), pa.float64(), pa.bool_(), pa.string())
    return next(kind for kind in kinds if all(_csv_value(value, kind) is not None for value in values))


def _csv_value(text: str, kind: pa.DataType) -> Any:
    """What the text says in that type; None where it is none of it."""
    if pa.types.is_integer(kind):
        return int(text) if _INTEGER.fullmatch(text) and int(text) in _whole_numbers(kind) else None
    if pa.types.is_floating(kind):
        return float(text) if _DECIMAL.fullmatch(text) and math.isfinite(float(text)) else None
    if pa.types.is_boolean(kind):
        return {"true": True, "false": False}.get(text.lower())
    return text if pa.types.is_string(kind) else None


def _leaves(kind: pa.DataType) -> list[pa.DataType]:
    """The types that a nested type is made of, in the end."""
    if pa.types.is_list(kind):
        return _leaves(kind.value_type)
    if pa.types.is_struct(kind) and kind.num_fields:
        return [leaf for child in kind for leaf in _leaves(child.type)]
    return [kind]


def _is_storable(leaves: Sequence[pa.DataType]) -> bool:
    """Whether a dataset can have a column of these: Parquet knows no object without keys."""
    return len(leaves) <= MAX_LEAVES and not any(map(pa.types.is_struct, leaves))


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "..."
