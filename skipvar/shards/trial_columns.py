"""A trial as columns of a dataset, which a run whose policy is `trials` has besides: their types, there and back."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from skipvar.skip.strategy import STRATEGY_NAMES
from skipvar.types import Probe, Trial

_BY_STRATEGY = pa.struct([(name, pa.float64()) for name in STRATEGY_NAMES])
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
READ_COLUMNS = ("prompt", GROUP_COLUMN, *(name for name, _ in TRIAL_COLUMNS))
"""Of a row, what `trial_of_columns` looks at."""
TRIAL_CLOCKS = ("trial_seconds", "trial_probe_seconds", "trial_latent_seconds")
"""Those that differ each time a trial is made."""


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
