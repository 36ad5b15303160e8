"""A row of the input becomes its requests, or failures that say what is wrong with it; never an exception."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from skipvar.config import InputConfig, SamplingConfig, StorageConfig
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


@dataclass(frozen=True)
class FileSpec:
    """What a reader needs to know of a Parquet file besides the slice."""

    size: int
    footer_checksum: int
    """CRC-32 of the file's footer."""
    is_part: bool = False
    """It is text input in its normal form (`skipvar.shards.parts`), not a file of the user's."""
    retyped: tuple[str, ...] = ()
    """The user's own columns that have another type in the plan, since other files have."""


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """All that `read_unit` needs besides the unit; small, whatever the number of rows."""

    files: Mapping[str, FileSpec]
    columns: pa.Schema
    """The user's own columns."""
    storage: StorageConfig
    input: InputConfig
    sampling: SamplingConfig
    cfg: tuple[float, ...]
    """Of each scale, where the row has none of its own; as `tau`."""
    tau: tuple[float, ...]

    @property
    def num_scales(self) -> int:
        """K of the model's schedules."""
        return len(self.cfg)


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
    values = list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
    numbers = tuple(_number(item, name) for item in values)
    if any(number < 0 or (name == "tau" and np.float32(number) == 0) for number in numbers):
        raise RowError(
            f"{name} is {_shown(value)}; {'it must be above 0' if name == 'tau' else 'it must be at least 0'}"
        )
    if isinstance(value, list | tuple | np.ndarray):
        if len(numbers) != num_scales:
            expected = f"{num_scales} entries, one for each scale"
            raise RowError(f"{name} is a list of {len(numbers)}; it must be a number or a list of {expected}")
        return numbers
    return numbers * num_scales


class RowReader:
    """Turns rows into requests under one specification."""

    def __init__(self, spec: InputSpec) -> None:
        self._spec = spec

    def read(
        self,
        position: int,
        values: Mapping[str, Any],
        error: SkipvarError | None,
        where: str,
        retyped: Sequence[str] = (),
    ) -> Iterator[Request | Failure]:
        """The requests of the row at `position` of the whole input, or a failure for each of its images.

        `error`: the row is known to be bad. `where` names file and row in messages. `retyped`: see `FileSpec`.
        """
        columns: dict[str, Any] = {}
        settings: RowSettings | None = None
        try:
            if error is None:
                settings = self.settings(values)
                check_size(values)
            for field in self._spec.columns:
                value = values.get(field.name)
                columns[field.name] = _converted(value, field) if field.name in retyped else value
        except RowError as found:
            error = error or found
        except UNFIT_ERRORS as found:
            error = error or RowError(f"the row cannot be used ({first_line(found)})")
        for image_index in range(self._spec.sampling.images_per_prompt):
            id = self._id(position, image_index, values)
            if error is None:
                assert settings is not None
                yield self._request(position, image_index, id, settings, columns)
            else:
                yield Failure(
                    position=position,
                    image_index=image_index,
                    id=id,
                    prompt=shown_prompt(values.get(self._spec.input.prompt_column)),
                    seed=None,
                    error_class=type(error).__name__,
                    message=f"{where}: {error}.",
                    columns=columns,
                )

    def _request(
        self, position: int, image_index: int, id: str, settings: RowSettings, columns: Mapping[str, Any]
    ) -> Request:
        seed, sampling = settings.seed, self._spec.sampling
        return Request(
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

    def settings(self, row: Mapping[str, Any]) -> RowSettings:
        """Prompt and sampling of the row; RowError where one is bad."""
        spec, names = self._spec, self._spec.input
        prompt = row.get(names.prompt_column)
        if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
            raise RowError(f"column '{names.prompt_column}' is empty; every row needs a prompt")
        if not isinstance(prompt, str):
            raise RowError(f"column '{names.prompt_column}' must be text, not {_shown(prompt)}")
        id = row.get(names.id_column)
        if not is_empty(id) and id_text(id) is None:
            raise RowError(f"column '{names.id_column}' must be text or a whole number, not {_shown(id)}")
        negative = row.get("negative_prompt")
        if negative is not None and not isinstance(negative, str):
            raise RowError(f"column 'negative_prompt' must be text, not {_shown(negative)}")
        if isinstance(id, str):
            checked_text(id, names.id_column)
        own_negative = checked_text(negative, "negative_prompt") if negative else None
        seed, cfg, tau, ratio = row.get("seed"), row.get("cfg"), row.get("tau"), row.get("aspect_ratio")
        return RowSettings(
            prompt=checked_text(prompt, names.prompt_column),
            negative_prompt=own_negative or spec.sampling.negative_prompt or None,
            seed=None if is_empty(seed) else _seed(seed),
            cfg=spec.cfg if is_empty(cfg) else per_scale(cfg, "cfg", spec.num_scales),
            tau=spec.tau if is_empty(tau) else per_scale(tau, "tau", spec.num_scales),
            aspect_ratio=spec.sampling.aspect_ratio if is_empty(ratio) else _ratio(ratio),
        )

    def _id(self, position: int, image_index: int, row: Mapping[str, Any]) -> str:
        """The user's label or the position in twelve digits, with the image's index where there are several."""
        given = row.get(self._spec.input.id_column)
        text = None if is_empty(given) else id_text(given)
        if text is not None:
            return text.encode("utf-8", "replace").decode()
        return f"{position:012d}" + (f"-{image_index}" if self._spec.sampling.images_per_prompt > 1 else "")


def is_empty(value: Any) -> bool:
    """Whether a cell counts as not given."""
    return value is None or (isinstance(value, str) and not value.strip())


def id_text(value: Any) -> str | None:
    """An id as text; None where it is neither text nor a whole number."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():  # whole numbers with gaps come as floats from many tools
        return str(int(value))
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        try:
            number = float(value) if isinstance(value, str) or type(value).__name__ == "Decimal" else math.nan
        except (ValueError, OverflowError):
            number = math.nan
    else:
        number = float(value) if -1e300 < value < 1e300 else math.inf
    with np.errstate(over="ignore"):
        if not np.isfinite(np.float32(number)):
            raise RowError(f"{name} is {_shown(value)}; it must be a finite number")
    return number


def _seed(value: Any) -> int:
    whole: int | None = None
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and len(value.strip()) < 25:
        whole = int(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        whole = value
    elif isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        whole = int(value)
    if whole is None or not 0 <= whole < 2**63:
        raise RowError(f"seed is {_shown(value)}; it must be a whole number from 0 to 2^63 - 1")
    return whole


def _ratio(value: Any) -> float:
    number = _number(value, "aspect_ratio")
    if number <= 0:
        raise RowError(f"aspect_ratio is {_shown(value)}; it must be height / width, above 0")
    return number


def _converted(value: Any, field: pa.Field) -> Any:
    """The value in the type that the plan gives its column; UNFIT_ERRORS where it does not fit."""
    return None if value is None else pa.scalar(value, field.type).as_py()


def check_size(row: Mapping[str, Any]) -> None:
    """RowError where a row holds more than a row may."""
    size = sum(approximate_bytes(value) for value in row.values())
    if size > MAX_ROW_BYTES:
        raise RowError(f"the row holds {size} bytes; at most {MAX_ROW_BYTES} are accepted")


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
