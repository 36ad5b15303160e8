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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from skipvar.skip.chances import ChanceTable, cheapest_above, table_to_json
from skipvar.skip.features import ProbeRule
from skipvar.skip.fitting import choose_probe
from skipvar.skip.policy_file import probe_to_json
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


@dataclass(frozen=True)
class Certificate:
    """What was tested, and what came of it."""

    ssim_floor: float
    alpha: float
    delta: float
    threshold: float
    n: int
    """Images of the test part."""
    misses: int
    """Of these, how many fell below the floor under the policy."""
    p_value: float
    num_tested: int
    """Candidates that were tested, the one that failed included."""

    @property
    def promise(self) -> str:
        """For a person, in one line: what holds at which confidence, and what the test counted."""
        return (
            f"with confidence {1 - self.delta:g} at most {self.alpha:g} of images have an SSIM to base "
            f"under {self.ssim_floor:g} ({self.misses} of {self.n} in the test)"
        )


@dataclass(frozen=True)
class Certified:
    """A policy that was proven."""

    rule: ProbeRule
    table: ChanceTable
    certificate: Certificate
    losses: Mapping[str, float]
    """Held-out log-loss of every probe that was tried, by its name."""

    def choose(self, trial: Trial) -> str:
        """The strategy of a trial's image."""
        return self.table.choose(self.rule.numbers(trial))[0]


def split_by_prompt(trials: Sequence[Trial], seed: int, shares: Sequence[float] = SHARES) -> Parts:
    """Whole prompts into fit, order and test; one image a prompt, drawn by the seed, stays in the test part."""
    stream = np.random.default_rng(seed)
    prompts = sorted({trial.prompt for trial in trials})
    order = stream.permutation(len(prompts))
    first, second = (round(sum(shares[:count]) * len(prompts)) for count in (1, 2))
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


def certify(parts: Parts, floor: float, alpha: float, delta: float, costs: Mapping[str, float]) -> Certified | None:
    """The cheapest policy that the test part proves; None where it proves none (`base` is all that is left).

    `costs`: token-forwards of an image by strategy, `base` among them; only strategies named there are chosen from.
    """
    strategies = sorted(costs.keys() - {"base"}, key=lambda name: (costs[name], name))
    fit, losses = choose_probe(parts.fit, floor, strategies)
    first = ChanceTable(floor, fit.scaling, fit.forecasts, threshold=1.0)
    tested = [first.chances(fit.rule.numbers(trial)) for trial in parts.test]
    found: Certified | None = None
    for count, threshold in enumerate(_ordered(first, parts.order, costs, fit.rule), start=1):
        chosen = [cheapest_above(chances, threshold) for chances in tested]
        misses = sum(trial.ssim[name] < floor for trial, name in zip(parts.test, chosen, strict=True))
        value = p_value(misses, len(parts.test), alpha)
        if value > delta:
            break
        certificate = Certificate(floor, alpha, delta, threshold, len(parts.test), misses, value, count)
        found = Certified(fit.rule, replace(first, threshold=threshold), certificate, losses)
    return found


def _ordered(table: ChanceTable, trials: Sequence[Trial], costs: Mapping[str, float], rule: ProbeRule) -> list[float]:
    """Candidate thresholds, fewest misses on these trials first; what another beats or equals in both is left out."""
    seen: list[tuple[int, float, float]] = []
    known = [table.chances(rule.numbers(trial)) for trial in trials]
    for threshold in THRESHOLDS:
        chosen = [cheapest_above(chances, threshold) for chances in known]
        misses = sum(trial.ssim[name] < table.floor for trial, name in zip(trials, chosen, strict=True))
        seen.append((misses, sum(costs[name] for name in chosen), threshold))
    ordered: list[float] = []
    cheapest = float("inf")
    for _misses, cost, threshold in sorted(seen, key=lambda entry: (entry[0], entry[1], -entry[2])):
        if cost < cheapest:
            ordered.append(threshold)
            cheapest = cost
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
    certificate = found.certificate
    decided = [(trial, found.choose(trial)) for trial in parts.test]
    floor = certificate.ssim_floor
    scores = np.array([trial.ssim[choice] for trial, choice in decided])
    return {
        "kind": "certified",
        "name": name,
        "promise": certificate.promise,
        "fitted_for": dict(fitted_for),
        "probe": probe_to_json(found.rule),
        "chances": table_to_json(found.table),
        "certificate": {
            **asdict(certificate),
            "held_out_log_loss": {key: round(loss, 4) for key, loss in found.losses.items()},
            "parts": {key: _identity(getattr(parts, key), found.rule) for key in ("fit", "order", "test")},
            "mean_ssim": round(float(scores.mean()), 4),
            "token_forwards_share": round(float(np.mean([costs[c] for _, c in decided])) / costs["base"], 4),
            "misses_by_strategy": _counts([(choice, trial.ssim[choice] < floor) for trial, choice in decided]),
            "misses_by_group": _counts([(trial.group, trial.ssim[choice] < floor) for trial, choice in decided]),
        },
    }


def _identity(trials: Sequence[Trial], rule: ProbeRule) -> dict[str, Any]:
    """How many trials a part holds, and a hash of them."""
    rows = [[trial.prompt, rule.numbers(trial), dict(sorted(trial.ssim.items()))] for trial in trials]
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    return {"trials": len(trials), "prompts": len({trial.prompt for trial in trials}), "sha256": digest}


def _counts(outcomes: Sequence[tuple[str, bool]]) -> dict[str, dict[str, int]]:
    images = Counter(key for key, _ in outcomes)
    misses = Counter(key for key, missed in outcomes if missed)
    return {key: {"images": images[key], "misses": misses[key]} for key in sorted(images)}
