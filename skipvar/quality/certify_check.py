"""Does certification keep its word? Many random splits of the trials, and each time a part that nobody touched."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from skipvar.skip.certify import certify, one_each, split_by_prompt
from skipvar.skip.policy import Promise
from skipvar.skip.tally import Tally, tally
from skipvar.types import Trial

logger = logging.getLogger(__name__)

UNTOUCHED_SHARE = 0.3
"""Of the prompts: what a split's certificate is judged by."""
_SEED = 0
_SPLITS_A_TASK = 10
"""A process is sent the trials with each task."""


def certify_check(
    trials: Sequence[Trial],
    promise: Promise,
    costs: Mapping[str, float],
    *,
    splits: int,
    processes: int = 1,
) -> dict[str, Any]:
    """How many splits' certified policies keep alpha on the untouched part, JSON-able; once more without any signal.

    `costs` are token-forwards by strategy.

    Without signal (`shuffled`) the scores of each trial are given to another one's probe: nothing can be told from the
    probe, and what is certified must be safe all the same. `processes`: -1 for one a core; the result does not
    depend on it.
    """
    order = np.random.default_rng(_SEED).permutation(len(trials))
    mixed = [replace(trial, ssim=trials[other].ssim) for trial, other in zip(trials, order, strict=True)]
    setting = {"ssim_floor": promise.floor, "alpha": promise.alpha, "delta": promise.delta, "trials": len(trials)}
    real, shuffled = (
        _summary(promise, _judge_all(kind, partial(_judge, some, promise, costs), splits, processes))
        for kind, some in (("trials as they are", trials), ("scores shuffled", mixed))
    )
    return setting | real | {"shuffled": shuffled}


def _judge_all(kind: str, judge: Callable[[int], Tally | None], splits: int, processes: int) -> list[Tally | None]:
    from joblib import Parallel, delayed

    found: list[Tally | None] = []
    pool = Parallel(n_jobs=processes, return_as="generator", batch_size=_SPLITS_A_TASK)
    for result in pool(delayed(judge)(split) for split in range(splits)):
        found.append(result)
        if len(found) % _SPLITS_A_TASK == 0 or len(found) == splits:
            logger.info("%s: %d of %d splits", kind, len(found), splits)
    return found


def _judge(trials: Sequence[Trial], promise: Promise, costs: Mapping[str, float], split: int) -> Tally | None:
    """What a split's certified policy comes to on the untouched part; None where nothing was certified."""
    prompts = sorted({trial.prompt for trial in trials})
    stream = np.random.default_rng((_SEED, split))
    chosen = stream.permutation(len(prompts))[: round(UNTOUCHED_SHARE * len(prompts))]
    away = {prompts[place] for place in chosen}
    parts = split_by_prompt([trial for trial in trials if trial.prompt not in away], int(stream.integers(2**31)))
    untouched = one_each([trial for trial in trials if trial.prompt in away], stream)
    found = certify(parts, promise, costs)
    return None if found is None else tally(untouched, found.choose(untouched), promise.floor, costs)


def _summary(promise: Promise, results: Sequence[Tally | None]) -> dict[str, Any]:
    """Within alpha: at most one standard error of a share among so many images above it."""
    alpha = promise.alpha
    certified = [result for result in results if result is not None]
    is_within = [one.share <= alpha + math.sqrt(alpha * (1 - alpha) / one.images) for one in certified]
    return {
        "splits": len(results),
        "splits_certified": len(certified),
        "splits_within_alpha": sum(is_within),
        "share_within_alpha": _mean(is_within),
        "mean_rate": _mean([one.share for one in certified]),
        "token_forwards_share": _mean([one.cost_share for one in certified]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 4) if values else None
