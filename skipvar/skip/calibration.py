"""Fits the paper's two-stage logistic policy from trials, and chooses the probe's grid by what it predicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skipvar.skip.features import DecodedProbe, LatentProbe, ProbeRule
from skipvar.skip.policy import LogisticPolicy
from skipvar.skip.policy_file import probe_to_json, stage_from_json
from skipvar.skip.strategy import NUM_DECIDED_SCALES
from skipvar.types import Probe

FOLDS = 5


@dataclass(frozen=True)
class TrialScores:
    """What fitting and comparing need of a trial."""

    probes: Mapping[int, Probe]
    """By the scale whose grid the probe was decoded at."""
    ssim: Mapping[str, float]
    """Of each strategy's image to the one of `base`."""
    prompt: str = ""
    """Images of one prompt share its difficulty: they are never split between parts."""
    group: str = ""
    """What kind of prompt it is: reported by, never fitted on."""
    latents: Sequence[float] = ()
    """The code sum at the decision scale as a small picture."""
    early_latents: Sequence[float] = ()
    """The same a scale earlier: tried, and used by no policy."""
    psnr: Mapping[str, float | None] = field(default_factory=dict)
    """In dB, by strategy; None for equal images. Reported, as `lpips`."""
    lpips: Mapping[str, float] | None = None
    """By strategy; None where it was not computed."""


def labels(trials: Sequence[TrialScores], kind: str, floor: float) -> np.ndarray:
    """For each trial the largest n for which `kind_1` to `kind_n` all keep an SSIM of at least `floor`; 0 if none does.

    The labels of SkipVAR (arXiv 2506.08908): as much skipped as the floor allows.
    """
    found = []
    for trial in trials:
        kept = [trial.ssim[f"{kind}_{count}"] >= floor for count in range(1, NUM_DECIDED_SCALES + 1)]
        found.append(kept.index(False) if False in kept else NUM_DECIDED_SCALES)
    return np.array(found)


def numbers(trial: TrialScores, rule: ProbeRule) -> tuple[float, ...]:
    """What a policy with this rule decides by."""
    return rule.pick(trial.latents) if isinstance(rule, LatentProbe) else trial.probes[rule.grid_scale].numbers


def features(trials: Sequence[TrialScores], grid_scale: int) -> np.ndarray:
    """`(trials, 2)` float64: Sobel change, FFT high-frequency ratio."""
    return np.array([trial.probes[grid_scale].numbers for trial in trials])


def choose_grid(trials: Sequence[TrialScores], floors: Sequence[float]) -> tuple[int, dict[int, float]]:
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
        chances = [_probability(stage, *row) for row in zip(x[held_out], y[held_out], strict=True)]
        total -= float(np.log(np.maximum(chances, 1e-6)).sum())
    return total / len(y)


def _probability(stage: Mapping[str, Any], row: np.ndarray, label: int) -> float:
    return stage_from_json(stage).probabilities(list(row)).get(int(label), 0.0)


def fit_stage(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Multinomial logistic regression on the standardised probe, as JSON for a policy file."""
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
    return {
        "classes": classes,
        "coef": coef.tolist(),
        "intercept": intercept.tolist(),
        "mean": mean.tolist(),
        "scale": scale.tolist(),
        "num_samples": len(y),
    }


def fit_policy(
    trials: Sequence[TrialScores], floor: float, grid_scale: int, *, name: str, fitted_for: Mapping[str, Any]
) -> dict[str, Any]:
    """A policy file's content: both stages at an SSIM floor, with what was seen on the trials themselves."""
    x = features(trials, grid_scale)
    skip, uncond = (fit_stage(x, labels(trials, kind, floor)) for kind in ("skip", "uncond"))
    policy = LogisticPolicy(
        name=name,
        content_hash="",
        decision_scale=None,
        probe=DecodedProbe(grid_scale),
        skip=stage_from_json(skip),
        uncond=stage_from_json(uncond),
    )
    chosen = [policy.choose(trial.probes[grid_scale].numbers).strategy for trial in trials]
    reached = np.array([trial.ssim[strategy] for trial, strategy in zip(trials, chosen, strict=True)])
    return {
        "kind": "logistic",
        "name": name,
        "promise": f"aims at an SSIM to base of {floor} for each image; what was reached on the trials is under fit",
        "fitted_for": dict(fitted_for),
        "probe": probe_to_json(DecodedProbe(grid_scale)),
        "stages": {"skip": skip, "uncond": uncond},
        "fit": {
            "num_trials": len(trials),
            "ssim_floor": floor,
            "mean_ssim": round(float(reached.mean()), 4),
            "share_under_floor": round(float((reached < floor).mean()), 4),
            "strategies": {strategy: chosen.count(strategy) for strategy in sorted(set(chosen))},
        },
    }


def rank_correlations(trials: Sequence[TrialScores], grid_scale: int) -> dict[str, list[float]]:
    """Spearman's correlation of each probe feature with the SSIM of skip_1, skip_2 and skip_3."""
    from scipy.stats import spearmanr

    x = features(trials, grid_scale)
    ssim = [[trial.ssim[f"skip_{count}"] for trial in trials] for count in range(1, NUM_DECIDED_SCALES + 1)]
    names = ("spearman_sobel", "spearman_fft")
    return {name: [round(float(spearmanr(x[:, i], y).statistic), 3) for y in ssim] for i, name in enumerate(names)}
