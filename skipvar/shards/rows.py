"""A row of the input becomes its requests, or failures that say what is wrong with it; never an exception."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from skipvar.config import InputConfig, RunConfig, SamplingConfig, StorageConfig
from skipvar.errors import RowError, SkipvarError, first_line
from skipvar.shards.columns import UNFIT_ERRORS, checked_text
from skipvar.types import Failure, Request

SETTINGS = {
    "seed": pa.int64(),
    "cfg": pa.string(),
    "tau": pa.string(),
    "negative_prompt": pa.string(),
    "aspect_ratio": pa.float64(),
}
"""Columns of the input that win over the configuration, beside the prompt's and the id's, and what they are kept as of
text input: `cfg` and `tau` are numbers or lists of numbers, as text of either."""

MAX_ROW_BYTES = 1 << 20
"""What a row's prompt and own columns may hold together: a unit of rows must stay small beside its images."""


class InputRow(NamedTuple):
    """A row of the input before it is checked."""

    values: Mapping[str, Any]
    """By column; of a bad row what there is."""
    error: SkipvarError | None
    """Why the row is bad, where that is known already."""
    where: str
    """File and row, for messages."""


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """How rows are read: all that `read_unit` needs besides the unit. Small, whatever the number of rows and files."""

    columns: pa.Schema
    """The user's own columns, in the types that the dataset keeps them in."""
    storage: StorageConfig
    input: InputConfig
    sampling: SamplingConfig
    cfg: tuple[float, ...]
    """Of each of the model's K scales, where the row has none of its own; as `tau`."""
    tau: tuple[float, ...]

    @classmethod
    def of(cls, config: RunConfig, num_scales: int, columns: pa.Schema) -> "InputSpec":
        """`ConfigError` for a cfg or tau that does not fit the K scales."""
        sampling = config.sampling
        cfg, tau = sampling.of_each_scale("cfg", num_scales), sampling.of_each_scale("tau", num_scales)
        return cls(columns=columns, storage=config.storage, input=config.input, sampling=sampling, cfg=cfg, tau=tau)


class RowSettings(NamedTuple):
    """What a row's image is made with, the run's where the row has none of its own."""

    prompt: str
    negative_prompt: str | None
    seed: int | None
    """None: to be derived."""
    cfg: tuple[float, ...]
    tau: tuple[float, ...]
    aspect_ratio: float


def derive_seed(run_seed: int, id: str, image_index: int) -> int:
    """The seed of a request that names none: the first 8 bytes of a SHA-256, mod 2**63."""
    digest = hashlib.sha256(f"{run_seed}|{id}|{image_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 2**63


def per_scale(value: Any, name: str, num_scales: int) -> tuple[float, ...]:
    """A setting for each of the K scales from a number, a list, or text of either ("3", "3,3,1", "[3, 3, 1]").

    Guidance is at least 0, a temperature above 0, both finite in float32. RowError otherwise.
    """
    if isinstance(value, str):
        text = value.strip()
        try:
            value = json.loads(text if text.startswith("[") or "," not in text else f"[{text}]")
        except ValueError:
            raise RowError(f"{name} is {text[:40]!r}; accepted are a number or a list of numbers") from None
    values = value if isinstance(value, list) else [value]
    numbers = tuple(_number(item, name) for item in values)
    if any(number < 0 or (name == "tau" and np.float32(number) == 0) for number in numbers):
        raise RowError(
            f"{name} is {_shown(value)}; {'it must be above 0' if name == 'tau' else 'it must be at least 0'}"
        )
    if isinstance(value, list):
        if len(numbers) != num_scales:
            expected = f"{num_scales} entries, one for each scale"
            raise RowError(f"{name} is a list of {len(numbers)}; it must be a number or a list of {expected}")
        return numbers
    return numbers * num_scales


def requests_of(row: InputRow, position: int, spec: InputSpec) -> Iterator[Request | Failure]:
    """The requests of the row at `position` of the whole input, or a failure for each of its images."""
    settings, error = None, row.error
    columns: dict[str, Any] = {}
    try:
        if error is None:
            settings = row_settings(row.values, spec)
        columns = {name: row.values.get(name) for name in spec.columns.names}
    except RowError as found:
        error = found
    sampling = spec.sampling
    label = label_of(row.values, spec.input.id_column)
    for image_index in range(sampling.images_per_prompt):
        suffix = f"-{image_index}" if sampling.images_per_prompt > 1 else ""
        id = f"{position:012d}{suffix}" if label is None else label
        if settings is None:
            yield Failure(
                position=position,
                image_index=image_index,
                id=id,
                prompt=shown_prompt(row.values.get(spec.input.prompt_column)),
                seed=None,
                error_class=type(error).__name__,
                message=f"{row.where}: {error}.",
                columns=columns,
            )
            continue
        seed = settings.seed
        yield Request(
            position=position,
            image_index=image_index,
            id=id,
            prompt=settings.prompt,
            negative_prompt=settings.negative_prompt,
            # A given seed names the row's first image; the others must not be its copies.
            seed=derive_seed(sampling.seed, id, image_index) if seed is None else (seed + image_index) % 2**63,
            cfg=settings.cfg,
            tau=settings.tau,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            aspect_ratio=settings.aspect_ratio,
            columns=columns,
        )


def row_settings(row: Mapping[str, Any], spec: InputSpec) -> RowSettings:
    """Prompt and sampling of the row; RowError where one is bad, or the row holds more than a row may."""
    try:
        settings = _settings(row, spec)
        size = sum(map(approximate_bytes, row.values()))
    except UNFIT_ERRORS as error:
        raise RowError(f"the row cannot be used ({first_line(error)})") from error
    if size > MAX_ROW_BYTES:
        raise RowError(f"the row holds {size} bytes; at most {MAX_ROW_BYTES} are accepted")
    return settings


def _settings(row: Mapping[str, Any], spec: InputSpec) -> RowSettings:
    names = spec.input
    prompt = row.get(names.prompt_column)
    if is_empty(prompt):
        raise RowError(f"column '{names.prompt_column}' is empty; every row needs a prompt")
    if not isinstance(prompt, str):
        raise RowError(f"column '{names.prompt_column}' must be text, not {_shown(prompt)}")
    id = row.get(names.id_column)
    if not is_empty(id) and _id_text(id) is None:
        raise RowError(f"column '{names.id_column}' must be text or a whole number, not {_shown(id)}")
    negative = row.get("negative_prompt")
    if negative is not None and not isinstance(negative, str):
        raise RowError(f"column 'negative_prompt' must be text, not {_shown(negative)}")
    if isinstance(id, str):
        checked_text(id, names.id_column)
    own_negative = checked_text(negative, "negative_prompt") if negative else None
    seed, cfg, tau, ratio = row.get("seed"), row.get("cfg"), row.get("tau"), row.get("aspect_ratio")
    num_scales = len(spec.cfg)
    return RowSettings(
        prompt=checked_text(prompt, names.prompt_column),
        negative_prompt=own_negative or spec.sampling.negative_prompt or None,
        seed=None if is_empty(seed) else _seed(seed),
        cfg=spec.cfg if is_empty(cfg) else per_scale(cfg, "cfg", num_scales),
        tau=spec.tau if is_empty(tau) else per_scale(tau, "tau", num_scales),
        aspect_ratio=spec.sampling.aspect_ratio if is_empty(ratio) else _ratio(ratio),
    )


def label_of(row: Mapping[str, Any], id_column: str) -> str | None:
    """The user's label of a row, good or bad, as valid text; None where it has none."""
    given = row.get(id_column)
    text = None if is_empty(given) else _id_text(given)
    return None if text is None else text.encode("utf-8", "replace").decode()


def is_empty(value: Any) -> bool:
    """Whether a cell counts as not given."""
    return value is None or (isinstance(value, str) and not value.strip())


def _id_text(value: Any) -> str | None:
    """An id as text; None where it is neither text nor a whole number."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():  # whole numbers with gaps come as floats from many tools
        return str(int(value))
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any, name: str) -> float:
    is_one = isinstance(value, int | float | str | Decimal) and not isinstance(value, bool)
    try:
        number = float(value) if is_one else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    with np.errstate(over="ignore"):
        if not np.isfinite(np.float32(number)):
            raise RowError(f"{name} is {_shown(value)}; it must be a finite number")
    return number


def _seed(value: Any) -> int:
    is_text = isinstance(value, str) and re.fullmatch("[0-9]{1,24}", value.strip()) is not None
    is_float = isinstance(value, float) and value.is_integer() and abs(value) <= 2**53
    whole = int(value) if is_text or is_float else value
    if type(whole) is not int or not 0 <= whole < 2**63:
        raise RowError(f"seed is {_shown(value)}; it must be a whole number from 0 to 2^63 - 1")
    return whole


def _ratio(value: Any) -> float:
    number = _number(value, "aspect_ratio")
    if number <= 0:
        raise RowError(f"aspect_ratio is {_shown(value)}; it must be height / width, above 0")
    return number


def approximate_bytes(value: Any) -> int:
    """About what a value takes in a file."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, list):
        return sum(map(approximate_bytes, value))
    if isinstance(value, dict):
        return sum(map(approximate_bytes, value.values()))
    return 8


def shown_prompt(prompt: Any) -> str:
    """What the error table shows of a prompt, whatever it was: valid text of bounded length."""
    try:
        text = prompt if isinstance(prompt, str) else "" if prompt is None else repr(prompt)
    except UNFIT_ERRORS:
        text = ""
    return text[:MAX_ROW_BYTES].encode("utf-8", "replace").decode()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
