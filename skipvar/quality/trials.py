"""Reads the trials of a run whose policy is `trials`, and says before it starts what its number of prompts buys."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from skipvar.errors import InputError
from skipvar.shards.schema import TRIAL_COLUMNS, trial_of_columns
from skipvar.shards.storage import Storage
from skipvar.shards.unitfile import data_files
from skipvar.skip.calibration import TrialScores
from skipvar.skip.certify import SHARES, allowed_misses
from skipvar.types import Trial

GROUP_COLUMN = "group"
"""The input's own column that names the kind of prompt."""
_COLUMNS = ("position", "image_index", "prompt", GROUP_COLUMN, *(name for name, _ in TRIAL_COLUMNS))


@dataclass(frozen=True)
class TrialTable:
    """All trials of a run, in the order of their requests."""

    scores: Sequence[TrialScores]
    probe_seconds: Mapping[int, float]
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


def _table(rows: Sequence[Mapping[str, Any]]) -> TrialTable:
    trials = [trial_of_columns(row) for row in rows]
    seconds = {
        grid: float(np.mean([trial.probe_seconds[grid] for trial in trials])) for grid in sorted(trials[0].probes)
    }
    return TrialTable(
        scores=[_scores(trial, row["prompt"], row.get(GROUP_COLUMN)) for trial, row in zip(trials, rows, strict=True)],
        probe_seconds=seconds,
        latent_seconds=float(np.mean([trial.latent_seconds for trial in trials])),
    )


def _scores(trial: Trial, prompt: str, group: Any) -> TrialScores:
    return TrialScores(
        probes=trial.probes,
        ssim=trial.ssim,
        prompt=prompt,
        group=str(group or ""),
        latents=tuple(trial.latents),
        early_latents=tuple(trial.early_latents),
        psnr=trial.psnr,
        lpips=trial.lpips,
    )


def _rows(storage: Storage) -> Iterator[dict[str, Any]]:
    for _, name in data_files(storage):
        with storage.open(name) as file, pq.ParquetFile(file, pre_buffer=False) as parquet:
            names = parquet.schema_arrow.names
            table = parquet.read(columns=[name for name in _COLUMNS if name in names], use_threads=False)
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
