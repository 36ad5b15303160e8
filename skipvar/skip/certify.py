"""Certified policies: with confidence 1 - delta at most a share alpha of images falls below an SSIM floor.

Learn-then-Test (Angelopoulos, Bates, Candès, Jordan, Lei 2021, arXiv 2110.01052) over three parts of the trials:

- **fit**: each strategy's chance of staying above the floor, from the probe that foretells it best;
- **order**: candidate thresholds, most careful first, those that cost more and miss no less than another left out;
- **test**: an exact binomial p-value for "more than alpha fall below" of each, in that order; the first that is not
  under delta ends the walk. Each is tested at delta, since it is only reached when all before it were rejected.

**Clusters.** Images of one prompt share its difficulty, so their misses are not independent and a binomial count of
them would be too sure of itself. Whole prompts go to one part, and the test part keeps one image a prompt, drawn
without looking at its scores. Then its rows are independent draws (a prompt, then a seed for it), which is what the
exact test needs, and the promise is about the next image of the next prompt. The other parts keep all their images:
nothing is inferred from them.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from skipvar.skip.chances import ChanceTable, cheapest_above, table_to_json
from skipvar.skip.features import ProbeRule
from skipvar.skip.fitting import choose_probe
from skipvar.skip.policy import Promise
from skipvar.skip.policy_file import probe_to_json
from skipvar.skip.tally import Tally, saved_at_equal_misses, tally
from skipvar.types import Trial

SHARES = (0.4, 0.1, 0.5)
"""Of the prompts: fit, order, test. The test part decides how few misses are still a proof, so it is the largest."""

THRESHOLDS = tuple(np.round(1 - np.geomspace(0.002, 0.6, 48), 5).tolist())
"""Candidate thresholds of the chance, most careful first."""


@dataclass(frozen=True)
class Parts:
    """Trials split by prompt; `test` holds one image a prompt."""

    fit: Sequence[Trial]
    order: Sequence[Trial]
    test: Sequence[Trial]


@dataclass(frozen=True, kw_only=True)
class Certified:
    """A policy that was proven, and how."""

    rule: ProbeRule
    table: ChanceTable
    promise: Promise
    tested: Tally
    """The images of the test part under the policy."""
    p_value: float
    num_tested: int
    """Thresholds that were tested until this one."""
    losses: Mapping[str, float]
    """Held-out log-loss of every probe that was tried, by its name."""

    def choose(self, trials: Sequence[Trial]) -> list[str]:
        """The strategy of each trial's image."""
        return [self.table.choose(self.rule.numbers(trial))[0] for trial in trials]

    @property
    def text(self) -> str:
        """For a person, in one line: what holds at which confidence, and what the test counted."""
        return (
            f"with confidence {1 - self.promise.delta:g} at most {self.promise.alpha:g} of images have an SSIM to base "
            f"under {self.promise.floor:g} ({self.tested.misses} of {self.tested.images} in the test)"
        )


def split_by_prompt(trials: Sequence[Trial], seed: int) -> Parts:
    """Whole prompts into fit, order and test; one image a prompt, drawn by the seed, stays in the test part."""
    stream = np.random.default_rng(seed)
    prompts = sorted({trial.prompt for trial in trials})
    order = stream.permutation(len(prompts))
    first, second = (round(sum(SHARES[:count]) * len(prompts)) for count in (1, 2))
    part_of = {prompts[place]: (rank >= first) + (rank >= second) for rank, place in enumerate(order)}
    parts: tuple[list[Trial], list[Trial], list[Trial]] = ([], [], [])
    for trial in trials:
        parts[part_of[trial.prompt]].append(trial)
    return Parts(parts[0], parts[1], one_each(parts[2], stream))


def one_each(trials: Sequence[Trial], stream: np.random.Generator) -> list[Trial]:
    """One trial a prompt, by the stream alone, in the order of the prompts' names."""
    by_prompt: dict[str, list[Trial]] = {}
    for trial in trials:
        by_prompt.setdefault(trial.prompt, []).append(trial)
    return [by_prompt[prompt][int(stream.integers(len(by_prompt[prompt])))] for prompt in sorted(by_prompt)]


def p_value(misses: int, n: int, alpha: float) -> float:
    """The chance of so few misses or fewer among n images if a share alpha fell below: exact, binomial."""
    from scipy.stats import binom

    return float(binom.cdf(misses, n, alpha))


def allowed_misses(n: int, alpha: float, delta: float) -> int:
    """The most misses among n images that still certify; -1 where n is too small for any."""
    from scipy.stats import binom

    found = int(binom.ppf(delta, n, alpha))  # the smallest k whose cdf is at least delta
    return found if binom.cdf(found, n, alpha) <= delta else found - 1


def certify(parts: Parts, promise: Promise, costs: Mapping[str, float]) -> Certified | None:
    """The cheapest policy that the test part proves; None where it proves none (`base` is all that is left).

    `costs`: token-forwards of an image by strategy, `base` among them; only strategies named there are chosen from.
    """
    strategies = sorted(costs.keys() - {"base"}, key=lambda name: (costs[name], name))
    fit, losses = choose_probe(parts.fit, promise.floor, strategies)
    first = ChanceTable(promise.floor, fit.scaling, fit.forecasts, threshold=1.0)
    found: Certified | None = None
    tallies = _tallies(first, fit.rule, parts.test, costs)
    for count, threshold in enumerate(_ordered(_tallies(first, fit.rule, parts.order, costs)), start=1):
        tested = tallies(threshold)
        value = p_value(tested.misses, tested.images, promise.alpha)
        if value > promise.delta:
            break
        found = Certified(
            rule=fit.rule,
            table=replace(first, threshold=threshold),
            promise=promise,
            tested=tested,
            p_value=value,
            num_tested=count,
            losses=losses,
        )
    return found


def _tallies(
    table: ChanceTable, rule: ProbeRule, trials: Sequence[Trial], costs: Mapping[str, float]
) -> Callable[[float], Tally]:
    """From a threshold to what these trials come to under it; their chances are worked out once."""
    known = [table.chances(rule.numbers(trial)) for trial in trials]

    def at(threshold: float) -> Tally:
        return tally(trials, [cheapest_above(chances, threshold) for chances in known], table.floor, costs)

    return at


def _ordered(tallies: Callable[[float], Tally]) -> list[float]:
    """Candidate thresholds, fewest misses first; what another beats or equals in misses and cost is left out."""
    found = {threshold: tallies(threshold) for threshold in THRESHOLDS}
    ordered: list[float] = []
    cheapest = float("inf")
    for threshold, one in sorted(found.items(), key=lambda item: (item[1].misses, item[1].cost_share, -item[0])):
        if one.cost_share < cheapest:
            ordered.append(threshold)
            cheapest = one.cost_share
    return ordered


def policy_content(
    parts: Parts,
    found: Certified,
    costs: Mapping[str, float],
    *,
    name: str,
    fitted_for: Mapping[str, Any],
) -> dict[str, Any]:
    """The policy file of what `certify` found: decision, promise, evidence, and what all of it holds for.

    The promise is about all images together; shares by strategy and by prompt group are reported because it says
    nothing of them.
    """
    fixed = [tally(parts.test, [strategy] * len(parts.test), found.promise.floor, costs) for strategy in costs]
    chosen, tested, promise = found.choose(parts.test), found.tested, found.promise
    has_missed = (tested.ssim < promise.floor).tolist()
    return {
        "kind": "certified",
        "name": name,
        "promise": found.text,
        "fitted_for": dict(fitted_for),
        "probe": probe_to_json(found.rule),
        "chances": table_to_json(found.table),
        "certificate": {
            "ssim_floor": promise.floor,
            "alpha": promise.alpha,
            "delta": promise.delta,
            "threshold": found.table.threshold,
            "n": tested.images,
            "misses": tested.misses,
            "p_value": found.p_value,
            "num_tested": found.num_tested,
            "held_out_log_loss": {key: round(loss, 4) for key, loss in found.losses.items()},
            "parts": {key: _identity(getattr(parts, key), found.rule) for key in ("fit", "order", "test")},
            "mean_ssim": round(tested.mean_ssim, 4),
            "token_forwards_share": round(tested.cost_share, 4),
            "misses_by_strategy": _counts(chosen, has_missed),
            "misses_by_group": _counts([trial.group for trial in parts.test], has_missed),
            "saved_at_equal_misses": saved_at_equal_misses(tested, fixed),
        },
    }


def _identity(trials: Sequence[Trial], rule: ProbeRule) -> dict[str, Any]:
    """How many trials a part holds, and a hash of them."""
    rows = [[trial.prompt, rule.numbers(trial), dict(sorted(trial.ssim.items()))] for trial in trials]
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    return {"trials": len(trials), "prompts": len({trial.prompt for trial in trials}), "sha256": digest}


def _counts(kinds: Sequence[str], has_missed: Sequence[bool]) -> dict[str, dict[str, int]]:
    """Images and misses of each kind."""
    images = Counter(kinds)
    misses = Counter(kind for kind, missed in zip(kinds, has_missed, strict=True) if missed)
    return {kind: {"images": images[kind], "misses": misses[kind]} for kind in sorted(images)}
