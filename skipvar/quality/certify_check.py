"""Does certification keep its word? Many random splits of the trials, and each time a part that nobody touched."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from skipvar.skip.calibration import TrialScores
from skipvar.skip.certify import certify, one_each, split_by_prompt

UNTOUCHED_SHARE = 0.3
"""Of the prompts: what a split's certificate is judged by."""


def certify_check(
    trials: Sequence[TrialScores],
    floor: float,
    alpha: float,
    delta: float,
    costs: Mapping[str, float],
    *,
    splits: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """How many splits' certified policies keep alpha on the untouched part, JSON-able; once more without any signal.

    Without signal (`shuffled`) the scores of each trial are given to another one's probe: nothing can be told from the
    probe, and what is certified must be safe all the same.
    """
    stream = np.random.default_rng(seed)
    order = stream.permutation(len(trials))
    mixed = [replace(trial, ssim=trials[other].ssim) for trial, other in zip(trials, order, strict=True)]
    setting = {"ssim_floor": floor, "alpha": alpha, "delta": delta, "trials": len(trials)}
    real = _judge(trials, floor, alpha, delta, costs, splits, stream)
    return setting | real | {"shuffled": _judge(mixed, floor, alpha, delta, costs, splits, stream)}


def _judge(
    trials: Sequence[TrialScores],
    floor: float,
    alpha: float,
    delta: float,
    costs: Mapping[str, float],
    splits: int,
    stream: np.random.Generator,
) -> dict[str, Any]:
    prompts = sorted({trial.prompt for trial in trials})
    rates, shares, allowed = [], [], []
    for _ in range(splits):
        chosen = stream.permutation(len(prompts))[: round(UNTOUCHED_SHARE * len(prompts))]
        away = {prompts[place] for place in chosen}
        parts = split_by_prompt([trial for trial in trials if trial.prompt not in away], int(stream.integers(2**31)))
        untouched = one_each([trial for trial in trials if trial.prompt in away], stream)
        found = certify(parts, floor, alpha, delta, costs)
        if found is None or not untouched:
            continue
        decided = [found.choose(trial) for trial in untouched]
        rates.append(np.mean([trial.ssim[name] < floor for trial, name in zip(untouched, decided, strict=True)]))
        shares.append(np.mean([costs[name] for name in decided]) / costs["base"])
        allowed.append(alpha + math.sqrt(alpha * (1 - alpha) / len(untouched)))
    within = sum(bool(rate <= bound) for rate, bound in zip(rates, allowed, strict=True))
    return {
        "splits": splits,
        "splits_certified": len(rates),
        "splits_within_alpha": within,
        "share_within_alpha": round(within / len(rates), 4) if rates else None,
        "mean_rate": round(float(np.mean(rates)), 4) if rates else None,
        "token_forwards_share": round(float(np.mean(shares)), 4) if rates else None,
    }
