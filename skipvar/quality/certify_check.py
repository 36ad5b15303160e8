"""Does certification keep its word? Many random splits of the trials, and each time a part that nobody touched."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from skipvar.skip.certify import certify, one_each, split_by_prompt
from skipvar.skip.policy import Promise
from skipvar.types import Trial

logger = logging.getLogger(__name__)

UNTOUCHED_SHARE = 0.3
"""Of the prompts: what a split's certificate is judged by."""
_SPLITS_A_TASK = 10
_Seeds = Sequence[tuple[int, int]]
"""Of splits: the seed of all and a place."""


@dataclass(frozen=True)
class SplitResult:
    """What a split's certified policy did on the untouched part."""

    rate: float
    """Share of images under the floor."""
    cost_share: float
    """Token-forwards over those of `base`."""
    allowed: float
    """Alpha and one standard error of a share among so many images."""


def certify_check(
    trials: Sequence[Trial],
    promise: Promise,
    costs: Mapping[str, float],
    *,
    splits: int = 200,
    seed: int = 0,
    processes: int = 1,
) -> dict[str, Any]:
    """How many splits' certified policies keep alpha on the untouched part, JSON-able; once more without any signal.

    `costs` are token-forwards by strategy.

    Without signal (`shuffled`) the scores of each trial are given to another one's probe: nothing can be told from the
    probe, and what is certified must be safe all the same. `processes`: -1 for one a core; the result does not
    depend on it.
    """
    order = np.random.default_rng(seed).permutation(len(trials))
    mixed = [replace(trial, ssim=trials[other].ssim) for trial, other in zip(trials, order, strict=True)]
    setting = {"ssim_floor": promise.floor, "alpha": promise.alpha, "delta": promise.delta, "trials": len(trials)}
    seeds = [(seed, place) for place in range(splits)]
    real, shuffled = (
        _summary(_judge_all(kind, partial(_judge, some, promise, costs), seeds, processes))
        for kind, some in (("trials as they are", trials), ("scores shuffled", mixed))
    )
    return setting | real | {"shuffled": shuffled}


def _judge_all(
    kind: str, judge: Callable[[_Seeds], list[SplitResult | None]], seeds: _Seeds, processes: int
) -> list[SplitResult | None]:
    from joblib import Parallel, delayed

    found: list[SplitResult | None] = []
    for some in Parallel(n_jobs=processes, return_as="generator")(
        delayed(judge)(seeds[start : start + _SPLITS_A_TASK]) for start in range(0, len(seeds), _SPLITS_A_TASK)
    ):
        found += some
        logger.info("%s: %d of %d splits", kind, len(found), len(seeds))
    return found


def _judge(
    trials: Sequence[Trial], promise: Promise, costs: Mapping[str, float], seeds: _Seeds
) -> list[SplitResult | None]:
    """A result for each of the seeds' splits; None where nothing was certified."""
    prompts = sorted({trial.prompt for trial in trials})
    floor, alpha = promise.floor, promise.alpha
    results: list[SplitResult | None] = []
    for seed in seeds:
        stream = np.random.default_rng(seed)
        chosen = stream.permutation(len(prompts))[: round(UNTOUCHED_SHARE * len(prompts))]
        away = {prompts[place] for place in chosen}
        parts = split_by_prompt([trial for trial in trials if trial.prompt not in away], int(stream.integers(2**31)))
        untouched = one_each([trial for trial in trials if trial.prompt in away], stream)
        found = certify(parts, floor, alpha, promise.delta, costs)
        if found is None:
            results.append(None)
            continue
        decided = [found.choose(trial) for trial in untouched]
        missed = [trial.ssim[name] < floor for trial, name in zip(untouched, decided, strict=True)]
        share = float(np.mean([costs[name] for name in decided])) / costs["base"]
        allowed = alpha + math.sqrt(alpha * (1 - alpha) / len(untouched))
        results.append(SplitResult(float(np.mean(missed)), share, allowed))
    return results


def _summary(results: Sequence[SplitResult | None]) -> dict[str, Any]:
    certified = [result for result in results if result is not None]
    within = sum(result.rate <= result.allowed for result in certified)
    return {
        "splits": len(results),
        "splits_certified": len(certified),
        "splits_within_alpha": within,
        "share_within_alpha": round(within / len(certified), 4) if certified else None,
        "mean_rate": round(float(np.mean([result.rate for result in certified])), 4) if certified else None,
        "token_forwards_share": round(float(np.mean([r.cost_share for r in certified])), 4) if certified else None,
    }
