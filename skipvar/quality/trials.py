"""Reads the trials of a run whose policy is `trials`, and says before it starts what its number of prompts buys."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from skipvar.errors import InputError
from skipvar.shards.storage import Storage
from skipvar.shards.unitfile import DATA, parse_data_name
from skipvar.skip.calibration import TrialScores
from skipvar.skip.certify import SHARES, allowed_misses
from skipvar.types import Probe

_COLUMNS = (
    "position", "image_index", "prompt", "trial_ssim", "trial_psnr", "trial_lpips", "trial_seconds", "trial_probes",
    "trial_probe_seconds", "trial_latents", "trial_early_latents", "trial_latent_seconds",
)  # fmt: skip
GROUP_COLUMN = "group"
"""The input's own column that names the kind of prompt."""


@dataclass(frozen=True)
class TrialTable:
    """All trials of a run, in the order of their requests."""

    scores: Sequence[TrialScores]
    psnr: Sequence[dict[str, float | None]]
    """By strategy; None for equal images."""
    lpips: Sequence[dict[str, float] | None]
    """By strategy; None where it was not computed."""
    seconds: dict[str, float]
    """Mean of an image, by strategy, without the probe."""
    probe_seconds: dict[int, float]
    """Mean of taking the decoded probe, by grid scale."""
    latent_seconds: float
    """Mean of taking the one that needs no decoding."""


def read_trials(storage: Storage) -> TrialTable:
    """The trials that are published in a run's output; raises `InputError` where there are none, or damaged ones."""
    try:
        rows = sorted(_rows(storage), key=lambda row: (row["position"], row["image_index"]))
        if not rows:
            raise InputError(f"{storage.uri}: holds no trials; jobs.calibrate makes them.")
        return _table(rows)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{storage.uri}: its trials cannot be read; `skipvar verify OUTPUT` tells which files are damaged."
        ) from error


def _table(rows: Sequence[dict[str, Any]]) -> TrialTable:
    probe_seconds: dict[int, list[float]] = {}
    scores = []
    for row in rows:
        probes = {}
        for entry, seconds in zip(row["trial_probes"], row["trial_probe_seconds"], strict=True):
            grid = entry.pop("grid_scale")
            probes[grid] = Probe(**entry)
            probe_seconds.setdefault(grid, []).append(seconds)
        group = str(row.get(GROUP_COLUMN) or "")
        latents = tuple(tuple(row[name]) for name in ("trial_latents", "trial_early_latents"))
        scores.append(TrialScores(probes, row["trial_ssim"], row["prompt"], group, *latents))
    return TrialTable(
        scores=scores,
        psnr=[row["trial_psnr"] for row in rows],
        lpips=[row.get("trial_lpips") for row in rows],
        seconds={
            name: float(np.mean([row["trial_seconds"][name] for row in rows])) for name in rows[0]["trial_seconds"]
        },
        probe_seconds={grid: float(np.mean(values)) for grid, values in sorted(probe_seconds.items())},
        latent_seconds=float(np.mean([row["trial_latent_seconds"] for row in rows])),
    )


def _rows(storage: Storage) -> Iterator[dict[str, Any]]:
    for entry in storage.list(DATA):
        if parse_data_name(entry.name) is None:
            continue
        with storage.open(entry.name) as file:
            names = pq.read_schema(file).names
            columns = [name for name in (*_COLUMNS, GROUP_COLUMN) if name in names]
            table = pq.read_table(file, columns=columns)
        if "trial_ssim" not in names or table["trial_ssim"].null_count:
            raise InputError(f"{storage.uri}: is no run of trials; jobs.calibrate makes one.")
        yield from table.to_pylist()


def what_trials_buy(num_prompts: int, alpha: float, delta: float) -> str:
    """A sentence on how many misses so many prompts forgive, and what more of them would."""
    sentences = []
    for count in (num_prompts, 2 * num_prompts):
        tested = round(SHARES[2] * count)
        allowed = allowed_misses(tested, alpha, delta)
        sentences.append(
            f"{count} prompts put {tested} in the test part, where at most {allowed} misses ({allowed / tested:.1%}) "
            f"certify a share of {alpha:g}"
            if allowed >= 0
            else f"{count} prompts put {tested} in the test part, too few to certify a share of {alpha:g}"
        )
    return "; ".join(sentences) + f" (confidence {1 - delta:g})."
