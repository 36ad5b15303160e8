"""Every fixed strategy and every policy against `base`, by one set of trials: similarity, cost, and who beats mixtures.

A policy that adapts to nothing does no better than a fixed strategy, or than drawing lots between two of them: all
mixtures of fixed strategies together are the convex hull of their points. So each policy is compared with that hull at
its own cost, and its cost with the cheapest mixture that misses as rarely.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from skipvar.quality.audit import share_interval
from skipvar.quality.trials import TrialTable
from skipvar.skip.calibration import TrialScores, numbers
from skipvar.skip.policy import Policy
from skipvar.skip.strategy import STRATEGY_NAMES
from skipvar.types import Request

PAPER_TABLE = (
    ("SkipVAR, paper, SSIM 0.88", 1.58, 0.909),
    ("SkipVAR, paper, SSIM 0.86", 1.70, 0.892),
    ("SkipVAR, paper, SSIM 0.84", 1.81, 0.879),
    ("SkipVAR, paper, its fixed hybrid", 2.62, 0.792),
    ("FastVAR, as the paper measures it", 2.53, 0.692),
)
"""Speed against `base` and mean SSIM that arXiv 2506.08908 reports for Infinity-2B on DrawBench; shown beside ours."""
PAPER_MODEL = "infinity_2b"
ORACLE = "oracle"
"""The name of what a policy could do at best."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Score:
    """What one policy does to one set of prompts."""

    policy: str
    prompt_set: str
    images: int
    mean_ssim: float
    fifth_percentile: float
    misses: int
    """Images under the floor."""
    interval: tuple[float, float]
    """95%, of the share under the floor."""
    mean_psnr: float | None
    """In dB, over the images that differ from `base`; None where none does."""
    mean_lpips: float | None
    """Over the images where it was computed; None: nowhere."""
    cost_share: float
    """Token-forwards over those of `base`."""
    strategies: Mapping[str, int]

    @property
    def share_under_floor(self) -> float:
        return self.misses / self.images


@dataclass(frozen=True)
class Choice:
    """A policy's name and the strategy that it names for each trial."""

    policy: str
    strategies: Sequence[str]


def choices(policies: Sequence[Policy], trials: Sequence[TrialScores], request: Request) -> list[Choice]:
    """Every fixed strategy, then every policy, as it decides by each trial's probe; `request`: one of the run's."""
    fixed = [Choice(name, [name] * len(trials)) for name in STRATEGY_NAMES]
    decided = [
        Choice(one.name, [one.decide(request, numbers(trial, one.probe)).strategy for trial in trials])
        for one in policies
    ]
    return [*fixed, *decided]


def oracle(trials: Sequence[TrialScores], floor: float, costs: Mapping[str, float]) -> Choice:
    """What knows each image's SSIM beforehand: of every image the cheapest strategy that stays above the floor."""
    cheapest_first = sorted(STRATEGY_NAMES, key=lambda name: costs[name])
    return Choice(ORACLE, [next(name for name in cheapest_first if one.ssim[name] >= floor) for one in trials])


def score(choice: Choice, table: TrialTable, prompt_set: str, floor: float, costs: Mapping[str, float]) -> Score:
    """What a policy's choices come to over a set's trials. `costs`: token-forwards by strategy."""
    names = choice.strategies
    named = list(zip(table.scores, names, strict=True))
    ssim = np.array([trial.ssim[name] for trial, name in named])
    psnr = [value for trial, name in named if (value := trial.psnr[name]) is not None]
    lpips = [trial.lpips[name] for trial, name in named if trial.lpips is not None]
    misses = int((ssim < floor).sum())
    return Score(
        policy=choice.policy,
        prompt_set=prompt_set,
        images=len(named),
        mean_ssim=float(ssim.mean()),
        fifth_percentile=float(np.percentile(ssim, 5)),
        misses=misses,
        interval=share_interval(misses, len(named)),
        mean_psnr=float(np.mean(psnr)) if psnr else None,
        mean_lpips=float(np.mean(lpips)) if lpips else None,
        cost_share=float(np.mean([costs[name] for name in names]) / costs["base"]),
        strategies={name: names.count(name) for name in sorted(set(names))},
    )


def best_value(points: Sequence[Point], cost: float) -> float:
    """The highest value that a mixture of points `(cost, value)` has at no more than this cost."""
    found = [value for at, value in points if at <= cost]
    for (low, first), (high, second) in ((a, b) for a in points for b in points if a[0] < cost < b[0]):
        found.append(first + (second - first) * (cost - low) / (high - low))
    return max(found)


def cheapest(points: Sequence[Point], value: float) -> float:
    """The lowest cost of a mixture of points `(cost, value)` that has at most this value (a share of misses)."""
    found = [cost for cost, at in points if at <= value]
    for (first, low), (second, high) in ((a, b) for a in points for b in points if a[1] < value < b[1]):
        found.append(first + (second - first) * (value - low) / (high - low))
    return min(found)


def evaluate(
    sets: Mapping[str, TrialTable],
    policies: Sequence[Policy],
    request: Request,
    floor: float,
    costs: Mapping[str, float],
) -> list[dict[str, Any]]:
    """A JSON-able row for each prompt set and policy, and for the oracle; `above_fixed_hull` in SSIM at its cost, and
    by what share its token-forwards are fewer than those of the cheapest mixture that misses as rarely, and of the one
    whose mean SSIM is as high."""
    rows = []
    for name, table in sets.items():
        chosen = [*choices(policies, table.scores, request), oracle(table.scores, floor, costs)]
        scores = [score(choice, table, name, floor, costs) for choice in chosen]
        fixed = scores[: len(STRATEGY_NAMES)]
        for one in scores:
            hull = best_value([(other.cost_share, other.mean_ssim) for other in fixed], one.cost_share)
            mixture = cheapest([(other.cost_share, other.share_under_floor) for other in fixed], one.share_under_floor)
            alike = cheapest([(other.cost_share, -other.mean_ssim) for other in fixed], -one.mean_ssim)
            rows.append(
                {
                    "policy": one.policy,
                    "set": name,
                    "is_fixed": one in fixed,
                    "images": one.images,
                    "mean_ssim": round(one.mean_ssim, 4),
                    "fifth_percentile": round(one.fifth_percentile, 4),
                    "floor": floor,
                    "share_under_floor": round(one.share_under_floor, 4),
                    "interval": [round(value, 4) for value in one.interval],
                    "mean_psnr": None if one.mean_psnr is None else round(one.mean_psnr, 2),
                    "mean_lpips": None if one.mean_lpips is None else round(one.mean_lpips, 4),
                    "token_forwards_share": round(one.cost_share, 4),
                    "speedup_token_forwards": round(1 / one.cost_share, 3),
                    "above_fixed_hull": round(one.mean_ssim - hull, 4),
                    "saved_at_equal_misses": round(1 - one.cost_share / mixture, 4),
                    "saved_at_equal_ssim": round(1 - one.cost_share / alike, 4),
                    "strategies": dict(one.strategies),
                }
            )
    return rows


def image_rows(
    sets: Mapping[str, TrialTable], policies: Sequence[Policy], request: Request, costs: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row for each trial and policy: what every number of the table is a mean of."""
    return [
        {
            "place": place,
            "prompt": trial.prompt,
            "set": name,
            "group": trial.group,
            "policy": choice.policy,
            "strategy": (strategy := choice.strategies[place]),
            "ssim": trial.ssim[strategy],
            "psnr": trial.psnr[strategy],
            "lpips": None if trial.lpips is None else trial.lpips[strategy],
            "token_forwards_share": costs[strategy] / costs["base"],
        }
        for name, table in sets.items()
        for choice in choices(policies, table.scores, request)
        for place, trial in enumerate(table.scores)
    ]


def markdown(rows: Sequence[Mapping[str, Any]], model: str) -> str:
    """A table for each prompt set; the paper's own numbers beneath where the model is its own."""
    lines: list[str] = []
    for name in dict.fromkeys(row["set"] for row in rows):
        some = [row for row in rows if row["set"] == name]
        lines += [
            f"## {name}: {some[0]['images']} prompts, SSIM floor {some[0]['floor']}",
            "",
            "| policy | SSIM | 5% | under the floor (95%) | PSNR | LPIPS | token-forwards | above hull "
            "| saved at equal misses | batch of 1 | full batches |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *(_line(row) for row in some),
            "",
        ]
    if model == PAPER_MODEL:
        lines += [
            "Reported by the paper (DrawBench, its own machine):",
            "",
            "| method | speed | SSIM |",
            "|---|---|---|",
        ]
        lines += [f"| {name} | {speed:.2f} x | {ssim:.3f} |" for name, speed, ssim in PAPER_TABLE]
    return "\n".join(lines).rstrip() + "\n"


def _line(row: Mapping[str, Any]) -> str:
    def times(key: str) -> str:
        return f"{row[key]:.2f} x" if row.get(key) else "–"

    low, high = row["interval"]
    psnr = "–" if row["mean_psnr"] is None else f"{row['mean_psnr']:.1f} dB"
    lpips = "–" if row["mean_lpips"] is None else f"{row['mean_lpips']:.3f}"
    return (
        f"| {row['policy']} | {row['mean_ssim']:.3f} | {row['fifth_percentile']:.3f} "
        f"| {row['share_under_floor']:.1%} ({low:.1%} to {high:.1%}) | {psnr} | {lpips} "
        f"| {times('speedup_token_forwards')} | {row['above_fixed_hull']:+.4f} | {row['saved_at_equal_misses']:.1%} "
        f"| {times('speedup_one')} | {times('speedup')} |"
    )
