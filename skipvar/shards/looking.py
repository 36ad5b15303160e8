"""A look at every file of the input: Parquet footers, text files' first rows; which columns there are, of what type."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa

from skipvar.config import RunConfig
from skipvar.errors import InputError, first_line
from skipvar.shards.columns import UNFIT_ERRORS, shown_name
from skipvar.shards.inputs import InputFile, Inputs
from skipvar.shards.rows import SETTINGS
from skipvar.shards.schema import storable_columns
from skipvar.shards.sources import Footer, read_footer
from skipvar.shards.textinput import Look, look_at

_FOOTER_THREADS = 16


@dataclass(frozen=True)
class LookedAt:
    """A file of the input and its columns. One of `footer` and `look` is there."""

    file: InputFile
    columns: Sequence[str]
    """All names, those that are settings too."""
    own: pa.Schema
    """The user's own columns; of Parquet as the file has them."""
    footer: Footer | None = field(default=None, repr=False)
    look: Look | None = None
    is_beyond: bool = False
    """It begins beyond `input.limit`: its columns do not count."""


def look_at_all(inputs: Inputs, config: RunConfig) -> list[LookedAt]:
    """Every file of the input, in order. `InputError` names one that lacks the prompt's column or cannot be read."""
    files = inputs.find(config.input.path)
    special = frozenset({config.input.prompt_column, config.input.id_column, *SETTINGS})
    left = config.input.limit
    found: list[LookedAt] = []
    for file, footer in zip(files, _read_footers(inputs, files), strict=True):
        is_beyond = left is not None and left <= 0
        if footer is not None:
            num_rows = footer.num_rows
            own = _parquet_columns(file, footer.schema, special, config.input.prompt_column)
            found.append(LookedAt(file, footer.schema.names, own, footer=footer, is_beyond=is_beyond or not num_rows))
        else:
            look = look_at(inputs, file, config.input.prompt_column, special, None if left is None else max(0, left))
            num_rows = look.num_rows
            found.append(LookedAt(file, look.names, look.own, look=look, is_beyond=is_beyond or not num_rows))
        left = None if left is None else left - num_rows
        _check_names(found[-1], config.input.prompt_column)
    _check_id_column(config.input.id_column, found)
    return found


def unify(files: Sequence[LookedAt]) -> pa.Schema:
    """One type for each of the user's own columns over all files."""
    result = pa.schema([])
    for found in files:
        if found.is_beyond or found.own.equals(result, check_metadata=True):
            continue
        try:
            result = pa.unify_schemas([result, found.own], promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(
                f"{found.file.uri}: a column has another type than in the files before it ({first_line(error)})."
            ) from error
    return storable_columns(result, files[0].file.uri)


def _read_footers(inputs: Inputs, files: Sequence[InputFile]) -> list[Footer | None]:
    """Parquet files' footers, several at a time: on S3 each takes two round trips."""

    def read(file: InputFile) -> Footer | None:
        if file.format != "parquet":
            return None
        with inputs.open(file.uri) as stream:
            return read_footer(stream, file.uri, file.size)

    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        return list(pool.map(read, files))


def _parquet_columns(file: InputFile, columns: pa.Schema, special: frozenset[str], prompt_column: str) -> pa.Schema:
    own = [column for column in columns if column.name not in special]
    for at in columns.get_all_field_indices(prompt_column):
        kind = storable_columns([columns.field(at)], file.uri).types[0]
        if not pa.types.is_string(kind):
            raise InputError(f"{file.uri}: column {shown_name(prompt_column)} is {kind}; prompts must be text.")
    try:
        storable_columns(own, file.uri)
    except UNFIT_ERRORS as error:
        raise InputError(f"{file.uri}: its columns cannot be used ({first_line(error)}).") from error
    return pa.schema(own)


def _check_names(found: LookedAt, wanted: str) -> None:
    names = found.columns
    if len(set(names)) < len(names):
        raise InputError(f"{found.file.uri}: two columns have one name; names must differ.")
    if wanted not in names and (names or found.file.format != "jsonl"):
        shown = ", ".join(name if len(name) <= 40 else name[:37] + "..." for name in names[:20]) or "none"
        raise InputError(
            f"{found.file.uri} has no column {shown_name(wanted)}; it has {shown[:200]}; "
            "name the right one by input.prompt_column."
        )


def _check_id_column(name: str, files: Sequence[LookedAt]) -> None:
    """An id column that the user named must be somewhere; the default one need not. A jsonl row may lack it."""
    if name != "id" and not any(name in found.columns for found in files):
        raise InputError(f"input.id_column: no file of the input has a column {shown_name(name)}.")
