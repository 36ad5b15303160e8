"""Fits the paper's two-stage logistic policy from trials, and chooses the probe's grid by what it predicts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from skipvar.skip.features import DecodedProbe
from skipvar.skip.policy import LogisticPolicy, LogisticStage
from skipvar.skip.policy_file import probe_to_json
from skipvar.skip.strategy import NUM_DECIDED_SCALES
from skipvar.types import Trial

FOLDS = 5


def labels(trials: Sequence[Trial], kind: str, floor: float) -> np.ndarray:
    """For each trial the largest n for which `kind_1` to `kind_n` all keep an SSIM of at least `floor`; 0 if none does.

    The labels of SkipVAR (arXiv 2506.08908): as much skipped as the floor allows.
    """
    names = [f"{kind}_{count}" for count in range(1, NUM_DECIDED_SCALES + 1)]
    kept = np.array([[trial.ssim[name] >= floor for name in names] for trial in trials])
    count: np.ndarray = np.logical_and.accumulate(kept, axis=1).sum(axis=1)
    return count


def features(trials: Sequence[Trial], grid_scale: int) -> np.ndarray:
    """`(trials, 2)` float64: Sobel change, FFT high-frequency ratio."""
    return np.array([trial.probes[grid_scale].numbers for trial in trials])


def choose_grid(trials: Sequence[Trial], floors: Sequence[float]) -> tuple[int, dict[int, float]]:
    """The grid whose probe predicts the skip labels best, and each grid's cross-validated log-loss."""
    losses = {
        scale: float(
            np.mean([_held_out_loss(features(trials, scale), labels(trials, "skip", floor)) for floor in floors])
        )
        for scale in sorted(trials[0].probes)
    }
    return min(losses, key=losses.__getitem__), losses


def _held_out_loss(x: np.ndarray, y: np.ndarray) -> float:
    """Mean negative log-probability of the right label over folds; a label that a fold never saw counts as 1e-6."""
    total = 0.0
    for fold in range(FOLDS):
        held_out = np.arange(len(y)) % FOLDS == fold
        stage = fit_stage(x[~held_out], y[~held_out])
        known = zip(x[held_out].tolist(), y[held_out].tolist(), strict=True)
        chances = [stage.probabilities(row).get(label, 0.0) for row, label in known]
        total -= float(np.log(np.maximum(chances, 1e-6)).sum())
    return total / len(y)


def fit_stage(x: np.ndarray, y: np.ndarray) -> LogisticStage:
    """Multinomial logistic regression of labels `(trials,)` on the standardised probe `(trials, 2)`."""
    from sklearn.linear_model import LogisticRegression

    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale == 0] = 1.0  # a feature that never varies says nothing; dividing by it would
    classes = sorted({int(label) for label in y})
    if len(classes) == 1:
        coef, intercept = np.zeros((1, x.shape[1])), np.zeros(1)
    else:
        model = LogisticRegression(C=1.0, max_iter=1000).fit((x - mean) / scale, y)
        coef, intercept = model.coef_, model.intercept_
    if len(classes) == 2:  # scikit-learn keeps one row, the log-odds of the second class
        coef, intercept = np.vstack([np.zeros_like(coef), coef]), np.array([0.0, intercept[0]])
    return LogisticStage(
        classes=tuple(classes),
        coef=tuple(map(tuple, coef.tolist())),
        intercept=tuple(intercept.tolist()),
        mean=tuple(mean.tolist()),
        scale=tuple(scale.tolist()),
    )


def fit_policy(
    trials: Sequence[Trial], floor: float, grid_scale: int, *, name: str, fitted_for: Mapping[str, Any]
) -> dict[str, Any]:
    """A policy file's content: both stages at an SSIM floor, with what was seen on the trials themselves."""
    x, probe = features(trials, grid_scale), DecodedProbe(grid_scale)
    stages = {kind: fit_stage(x, labels(trials, kind, floor)) for kind in ("skip", "uncond")}
    policy = LogisticPolicy(
        name=name, content_hash="", decision_scale=None, probe=probe, skip=stages["skip"], uncond=stages["uncond"]
    )
    chosen = [policy.choose(probe.numbers(trial)).strategy for trial in trials]
    reached = np.array([trial.ssim[strategy] for trial, strategy in zip(trials, chosen, strict=True)])
    return {
        "kind": "logistic",
        "name": name,
        "promise": f"aims at an SSIM to base of {floor} for each image; what was reached on the trials is under fit",
        "fitted_for": dict(fitted_for),
        "probe": probe_to_json(probe),
        "stages": {kind: {**asdict(stage), "num_samples": len(trials)} for kind, stage in stages.items()},
        "fit": {
            "num_trials": len(trials),
            "ssim_floor": floor,
            "mean_ssim": round(float(reached.mean()), 4),
            "share_under_floor": round(float((reached < floor).mean()), 4),
            "strategies": {strategy: chosen.count(strategy) for strategy in sorted(set(chosen))},
        },
    }


def rank_correlations(trials: Sequence[Trial], grid_scale: int) -> dict[str, list[float]]:
    """Spearman's correlation of each probe feature with the SSIM of skip_1, skip_2 and skip_3."""
    from scipy.stats import spearmanr

    x = features(trials, grid_scale)
    ssim = [[trial.ssim[f"skip_{count}"] for trial in trials] for count in range(1, NUM_DECIDED_SCALES + 1)]
    names = ("spearman_sobel", "spearman_fft")
    return {name: [round(float(spearmanr(x[:, i], y).statistic), 3) for y in ssim] for i, name in enumerate(names)}
