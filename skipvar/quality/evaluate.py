"""Every fixed strategy and every policy against `base`, by one set of trials: similarity, cost, and who beats mixtures.

A policy that adapts to nothing does no better than a fixed strategy, or than drawing lots between two of them: all
mixtures of fixed strategies together are the convex hull of their points. So each policy is compared with that hull at
its own cost, and its cost with the cheapest mixture that misses as rarely.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from skipvar.quality.audit import share_interval
from skipvar.quality.speed import Speed
from skipvar.skip.policy import Policy
from skipvar.skip.strategy import STRATEGY_NAMES
from skipvar.skip.tally import best_value, cheapest, saved_at_equal_misses, tally
from skipvar.types import Request, Trial

ORACLE = "oracle"
"""The name of what a policy could do at best."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one policy does to one set of prompts, rounded for people."""

    policy: str
    set: str
    is_fixed: bool
    images: int
    mean_ssim: float
    fifth_percentile: float
    floor: float
    share_under_floor: float
    interval: tuple[float, float]
    """95%, of the share under the floor."""
    mean_psnr: float | None
    """In dB, over the images that differ from `base`; None where none does."""
    mean_lpips: float | None
    """Over the images where it was computed; None: nowhere."""
    token_forwards_share: float
    """Over those of `base`."""
    speedup_token_forwards: float
    above_fixed_hull: float
    """In SSIM: over the best mixture of fixed strategies that costs no more."""
    saved_at_equal_misses: float
    """Share of token-forwards: against the cheapest mixture of fixed strategies that misses as rarely,"""
    saved_at_equal_ssim: float
    """and against the one whose mean SSIM is as high."""
    strategies: Mapping[str, int]
    speed: Speed | None
    """By the clock; None: not measured."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what was not measured by the clock is left out."""
        row = asdict(self)
        speed = row.pop("speed")
        return row | (speed or {})


Choices = Mapping[str, Sequence[str]]
"""By a policy's name the strategy of each trial's image."""


def choices(policies: Sequence[Policy], trials: Sequence[Trial], request: Request) -> Choices:
    """Those of every fixed strategy, then of every policy.

    `request`: one of the run's.
    """
    decided = {
        one.name: [one.decide(request, one.probe.numbers(trial)).strategy for trial in trials] for one in policies
    }
    return {name: [name] * len(trials) for name in STRATEGY_NAMES} | decided


def oracle(trials: Sequence[Trial], floor: float, costs: Mapping[str, float]) -> list[str]:
    """What knows each image's SSIM beforehand: of every image the cheapest strategy that stays above the floor."""
    cheapest_first = sorted(STRATEGY_NAMES, key=lambda name: costs[name])
    return [next(name for name in cheapest_first if one.ssim[name] >= floor) for one in trials]


def evaluate(
    sets: Mapping[str, Sequence[Trial]],
    chosen_in: Mapping[str, Choices],
    floor: float,
    costs: Mapping[str, float],
    speeds: Mapping[str, Speed],
) -> list[Score]:
    """A score for each prompt set and what was chosen in it, and for the oracle.

    `costs`: token-forwards by strategy; `speeds`: by policy, where the clock ran.
    """
    found = []
    for set_name, trials in sets.items():
        chosen = {**chosen_in[set_name], ORACLE: oracle(trials, floor, costs)}
        tallies = {name: tally(trials, strategies, floor, costs) for name, strategies in chosen.items()}
        fixed = [tallies[name] for name in STRATEGY_NAMES]
        for name, one in tallies.items():
            hull = best_value([(other.cost_share, other.mean_ssim) for other in fixed], one.cost_share)
            alike = cheapest([(other.cost_share, -other.mean_ssim) for other in fixed], -one.mean_ssim)
            named = list(zip(trials, chosen[name], strict=True))
            low, high = share_interval(one.misses, one.images)
            score = Score(
                policy=name,
                set=set_name,
                is_fixed=name in STRATEGY_NAMES,
                images=one.images,
                mean_ssim=round(one.mean_ssim, 4),
                fifth_percentile=round(float(np.percentile(one.ssim, 5)), 4),
                floor=floor,
                share_under_floor=round(one.share, 4),
                interval=(round(low, 4), round(high, 4)),
                mean_psnr=_mean([trial.psnr[strategy] for trial, strategy in named], 2),
                mean_lpips=_mean([trial.lpips[strategy] if trial.lpips else None for trial, strategy in named], 4),
                token_forwards_share=round(one.cost_share, 4),
                speedup_token_forwards=round(1 / one.cost_share, 3),
                above_fixed_hull=round(one.mean_ssim - hull, 4),
                saved_at_equal_misses=saved_at_equal_misses(one, fixed),
                saved_at_equal_ssim=round(1 - one.cost_share / alike, 4),
                strategies=dict(sorted(Counter(chosen[name]).items())),
                speed=speeds.get(name),
            )
            found.append(score)
    return found


def _mean(values: Sequence[float | None], digits: int) -> float | None:
    """Of those that are known, rounded; None where none is."""
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), digits) if known else None


def image_table(
    sets: Mapping[str, Sequence[Trial]], chosen_in: Mapping[str, Choices], costs: Mapping[str, float]
) -> pa.Table:
    """One row for each trial and policy: what every number of the scores is a mean of."""
    return pa.Table.from_pylist(
        [
            {
                "place": place,
                "prompt": trial.prompt,
                "set": set_name,
                "group": trial.group,
                "policy": name,
                "strategy": strategy,
                "ssim": trial.ssim[strategy],
                "psnr": trial.psnr[strategy],
                "lpips": trial.lpips[strategy] if trial.lpips else None,
                "token_forwards_share": costs[strategy] / costs["base"],
            }
            for set_name, trials in sets.items()
            for name, strategies in chosen_in[set_name].items()
            for place, (trial, strategy) in enumerate(zip(trials, strategies, strict=True))
        ]
    )
