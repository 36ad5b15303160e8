"""The columns of a dataset and of its error table, with the metadata that makes `datasets` decode the images.

A run whose policy is `trials` has a trial's columns besides: their types, there and back.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from skipvar.errors import InputError
from skipvar.skip.policy import TRIALS
from skipvar.skip.strategy import STRATEGY_NAMES
from skipvar.types import Probe, Trial

SCHEMA_VERSION = 2
"""2: `strategy_scores` has ten fields; 1 had the paper's seven."""

JSON_TEXT = {b"skipvar": b"json"}
"""Metadata of a jsonl column whose values have no common type: each is kept as its JSON text."""

UNHASHED = frozenset(
    {"replica", "created_at", "engine_seconds", "trial_seconds", "trial_probe_seconds", "trial_latent_seconds"}
)
"""Columns that tell who made a row, when and how fast; two workers that make one unit agree on all the others."""

IMAGE_BYTES = "image.bytes"
"""The Parquet path of the images' leaf column."""

_BY_STRATEGY = pa.struct([(name, pa.float64()) for name in STRATEGY_NAMES])
_STANDARD = (
    ("id", pa.string()),
    ("position", pa.int64()),
    ("image_index", pa.int32()),
    ("prompt", pa.string()),
    ("negative_prompt", pa.string()),
    ("seed", pa.int64()),
    ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("format", pa.string()),
    ("strategy", pa.string()),
    ("policy", pa.string()),
    ("probe_sobel_change", pa.float64()),
    ("probe_fft_high_frequency_ratio", pa.float64()),
    ("strategy_scores", _BY_STRATEGY),
    ("cfg", pa.list_(pa.float32())),
    ("tau", pa.list_(pa.float32())),
    ("top_k", pa.int32()),
    ("top_p", pa.float64()),
    ("aspect_ratio", pa.float64()),
    ("scales_run", pa.int32()),
    ("cost_share", pa.float64()),
    ("audit_ssim", pa.float64()),
    ("model", pa.string()),
    ("fingerprint", pa.string()),
    ("unit", pa.int64()),
    ("replica", pa.string()),
    ("created_at", pa.timestamp("us", tz="UTC")),
    ("engine_seconds", pa.float64()),
)
_PROBE = pa.struct(
    [("grid_scale", pa.int32()), ("sobel_change", pa.float64()), ("fft_high_frequency_ratio", pa.float64())]
)
TRIAL_COLUMNS = (
    ("trial_ssim", _BY_STRATEGY),
    ("trial_psnr", _BY_STRATEGY),
    ("trial_lpips", _BY_STRATEGY),
    ("trial_seconds", _BY_STRATEGY),
    ("trial_probes", pa.list_(_PROBE)),
    ("trial_probe_seconds", pa.list_(pa.float64())),
    ("trial_latents", pa.list_(pa.float32())),
    ("trial_early_latents", pa.list_(pa.float32())),
    ("trial_latent_seconds", pa.float64()),
)
GROUP_COLUMN = "group"
"""The input's own column that names the kind of prompt."""
READ_TRIAL_COLUMNS = ("prompt", GROUP_COLUMN, *(name for name, _ in TRIAL_COLUMNS))
"""Of a row, what `trial_of_columns` looks at."""
_ERROR = (
    ("position", pa.int64()),
    ("image_index", pa.int32()),
    ("id", pa.string()),
    ("unit", pa.int64()),
    ("seed", pa.int64()),
    ("prompt", pa.string()),
    ("error_class", pa.string()),
    ("message", pa.string()),
    ("attempts", pa.int32()),
)


def dataset_schema(columns: pa.Schema, policy: str | None = None) -> pa.Schema:
    """The data files' schema: DESIGN.md's columns, a trial's where the run's policy makes them, then the user's own,
    under their own names where these are free."""
    standard = (*_STANDARD, *TRIAL_COLUMNS) if policy == TRIALS else _STANDARD
    return _schema(standard, columns, image={"_type": "Image"})


def error_schema(columns: pa.Schema) -> pa.Schema:
    """The schema of the error files. The user's columns bear the same names as in the data files."""
    return _schema(_ERROR, columns)


def _schema(standard: Iterable[tuple[str, pa.DataType]], columns: pa.Schema, **special: Any) -> pa.Schema:
    """Our columns and the user's, described for `datasets`; `special`: a column's feature where its type is not all."""
    names = own_names(columns.names)
    fields = [*(pa.field(*pair) for pair in standard), *(pa.field(names[field.name], field.type) for field in columns)]
    features = {field.name: special.get(field.name) or _feature(field.type) for field in fields}
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})


def own_names(columns: Sequence[str]) -> dict[str, str]:
    """The name in the dataset of each of the user's columns: its own, or with `input_` before it where it is taken."""
    taken = {name for name, _ in (*_STANDARD, *TRIAL_COLUMNS, *_ERROR)}
    names: dict[str, str] = {}
    for column in sorted(columns, key=lambda name: name in taken):  # free names first: they stay as they are
        name = column
        while name in taken:
            name = f"input_{name}"
        names[column] = name
        taken.add(name)
    return names


def trial_to_columns(trial: Trial) -> dict[str, Any]:
    """The values of a row; `trial_of_columns` reads them."""
    columns = {name: getattr(trial, name.removeprefix("trial_")) for name, _ in TRIAL_COLUMNS}
    columns["trial_probes"] = [{"grid_scale": grid, **asdict(probe)} for grid, probe in trial.probes.items()]
    columns["trial_probe_seconds"] = [trial.probe_seconds[grid] for grid in trial.probes]
    return columns


def trial_of_columns(row: Mapping[str, Any]) -> Trial:
    """The trial of a row. Raises KeyError, TypeError or ValueError where it holds none."""
    probes = {numbers.pop("grid_scale"): Probe(**numbers) for numbers in map(dict, row["trial_probes"])}
    return Trial(
        ssim=row["trial_ssim"],
        psnr=row["trial_psnr"],
        lpips=row.get("trial_lpips"),  # older runs have no such column
        seconds=row["trial_seconds"],
        probes=probes,
        probe_seconds=dict(zip(probes, row["trial_probe_seconds"], strict=True)),
        latents=row["trial_latents"],
        early_latents=row["trial_early_latents"],
        latent_seconds=row["trial_latent_seconds"],
        prompt=row["prompt"],
        group=str(row.get(GROUP_COLUMN) or ""),
    )


def storable_columns(fields: Iterable[pa.Field], origin: str) -> pa.Schema:
    """The user's columns in types that all readers know; `InputError` names one that has no such type."""
    result = []
    for field in fields:
        try:
            plain = _plain(field.type)
            _feature(plain)
        except TypeError as error:
            raise InputError(
                f"{origin}: column '{field.name}' has type {field.type}, which cannot be carried into the dataset; "
                "leave it out or turn it into text, numbers, lists or structs."
            ) from error
        metadata = field.metadata if field.metadata == JSON_TEXT else None
        result.append(pa.field(field.name, plain, metadata=metadata))
    return pa.schema(result)


def _plain(kind: pa.DataType) -> pa.DataType:
    """The same values without dictionaries, views, extension types and non-standard widths; nanoseconds are cut off."""
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_null(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain(kind.value_type))
    if pa.types.is_struct(kind) and kind.num_fields > 0:
        return pa.struct([pa.field(child.name, _plain(child.type)) for child in kind])
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if pa.types.is_time64(kind) and kind.unit == "ns":
        return pa.time64("us")
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    return kind


_SIMPLE = {
    pa.string(): "string", pa.binary(): "binary", pa.bool_(): "bool", pa.date32(): "date32", pa.date64(): "date64",
    pa.float16(): "float16", pa.float32(): "float32", pa.float64(): "float64",
    pa.int8(): "int8", pa.int16(): "int16", pa.int32(): "int32", pa.int64(): "int64",
    pa.uint8(): "uint8", pa.uint16(): "uint16", pa.uint32(): "uint32", pa.uint64(): "uint64",
}  # fmt: skip


def _feature(kind: pa.DataType) -> Any:
    """The description of a type in the `huggingface` metadata; TypeError for one that `datasets` does not know."""
    if kind in _SIMPLE:
        return {"dtype": _SIMPLE[kind], "_type": "Value"}
    if pa.types.is_timestamp(kind):
        return {"dtype": f"timestamp[{kind.unit}{f', tz={kind.tz}' if kind.tz else ''}]", "_type": "Value"}
    if pa.types.is_time(kind) or pa.types.is_duration(kind):
        name = "duration" if pa.types.is_duration(kind) else f"time{kind.bit_width}"
        return {"dtype": f"{name}[{kind.unit}]", "_type": "Value"}
    if pa.types.is_decimal128(kind):
        return {"dtype": f"decimal128({kind.precision}, {kind.scale})", "_type": "Value"}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    if pa.types.is_struct(kind) and kind.num_fields > 0:
        return {child.name: _feature(child.type) for child in kind}
    raise TypeError(f"no feature for {kind}")
