"""Certified policies: with confidence 1 - delta at most a share alpha of images falls below an SSIM floor.

Learn-then-Test (Angelopoulos, Bates, Candès, Jordan, Lei 2021, arXiv 2110.01052) over three parts of the trials:

- **fit**: each strategy's chance of staying above the floor, from the probe;
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
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from skipvar.skip.calibration import TrialScores, features
from skipvar.skip.chances import Chance, ChanceTable, expand, table_to_json

SHARES = (0.3, 0.15, 0.55)
"""Of the prompts: fit, order, test. The test part decides how few misses are still a proof, so it is the largest."""

THRESHOLDS = tuple(np.round(1 - np.geomspace(0.002, 0.6, 48), 5).tolist())
"""Candidate thresholds of the chance, most careful first."""

_FOLDS = 4
_COEFFICIENTS = {"linear": 2, "quadratic": 5}


@dataclass(frozen=True)
class Parts:
    """Trials split by prompt; `test` holds one image a prompt."""

    fit: Sequence[TrialScores]
    order: Sequence[TrialScores]
    test: Sequence[TrialScores]


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
        return (
            f"with confidence {1 - self.delta:g} at most {self.alpha:g} of images have an SSIM to base "
            f"under {self.ssim_floor:g} ({self.misses} of {self.n} in the test)"
        )


def split_by_prompt(trials: Sequence[TrialScores], seed: int, shares: Sequence[float] = SHARES) -> Parts:
    """Whole prompts into fit, order and test; one image a prompt, drawn by the seed, stays in the test part."""
    stream = np.random.default_rng(seed)
    prompts = sorted({trial.prompt for trial in trials})
    order = stream.permutation(len(prompts))
    first, second = (round(sum(shares[:count]) * len(prompts)) for count in (1, 2))
    part_of = {prompts[place]: (rank >= first) + (rank >= second) for rank, place in enumerate(order)}
    parts: tuple[list[TrialScores], list[TrialScores], list[TrialScores]] = ([], [], [])
    for trial in trials:
        parts[part_of[trial.prompt]].append(trial)
    return Parts(parts[0], parts[1], one_each(parts[2], stream))


def one_each(trials: Sequence[TrialScores], stream: np.random.Generator) -> list[TrialScores]:
    """One trial a prompt, by the stream alone, in the order of the prompts' names."""
    by_prompt: dict[str, list[TrialScores]] = {}
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


def certify(
    parts: Parts, floor: float, alpha: float, delta: float, costs: Mapping[str, float], grid_scale: int
) -> tuple[ChanceTable, Certificate] | None:
    """The cheapest policy that the test part proves; None where it proves none (`base` is all that is left).

    `costs`: token-forwards of an image by strategy, `base` among them; only strategies named there are chosen from.
    """
    chances = fit_chances(parts.fit, floor, costs, grid_scale)
    accepted: tuple[ChanceTable, Certificate] | None = None
    for tested, threshold in enumerate(_ordered(chances, parts.order, floor, costs, grid_scale), start=1):
        table = ChanceTable(chances, threshold)
        misses = sum(trial.ssim[choice] < floor for trial, choice in _decide(table, parts.test, grid_scale))
        value = p_value(misses, len(parts.test), alpha)
        if value > delta:
            break
        accepted = table, Certificate(floor, alpha, delta, threshold, len(parts.test), misses, value, tested)
    return accepted


def fit_chances(
    trials: Sequence[TrialScores], floor: float, costs: Mapping[str, float], grid_scale: int
) -> dict[str, Chance]:
    """Each strategy's chance, cheapest strategy first; linear or quadratic, by the log-loss on held-out prompts."""
    x = features(trials, grid_scale)
    folds = _folds(trials)
    chances = {}
    for strategy in sorted(costs.keys() - {"base"}, key=lambda name: (costs[name], name)):
        y = np.array([trial.ssim[strategy] >= floor for trial in trials])
        losses = {kind: _held_out_loss(x, y, folds, count) for kind, count in _COEFFICIENTS.items()}
        chances[strategy] = _fit_chance(x, y, _COEFFICIENTS[min(losses, key=losses.__getitem__)])
    return chances


def _folds(trials: Sequence[TrialScores]) -> np.ndarray:
    """A fold for each trial, the same for all images of a prompt."""
    places = {prompt: place for place, prompt in enumerate(sorted({trial.prompt for trial in trials}))}
    return np.array([places[trial.prompt] % _FOLDS for trial in trials])


def _held_out_loss(x: np.ndarray, y: np.ndarray, folds: np.ndarray, num_coefficients: int) -> float:
    """Mean negative log-probability of what happened, over folds."""
    total = 0.0
    for fold in sorted(set(folds.tolist())):
        away = folds == fold
        if away.all():
            return 0.0  # one prompt: nothing can be held out
        chance = _fit_chance(x[~away], y[~away], num_coefficients)
        seen = [chance(row) if kept else 1 - chance(row) for row, kept in zip(x[away], y[away], strict=True)]
        total -= float(np.log(np.maximum(seen, 1e-6)).sum())
    return total / len(y)


def _fit_chance(x: np.ndarray, y: np.ndarray, num_coefficients: int) -> Chance:
    from sklearn.linear_model import LogisticRegression

    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale == 0] = 1.0  # a feature that never varies says nothing; dividing by it would
    kept = int(y.sum())
    if kept in (0, len(y)):  # nothing to separate: the rule of succession
        share = (kept + 1) / (len(y) + 2)
        coef, intercept = np.zeros(num_coefficients), float(np.log(share / (1 - share)))
    else:
        terms = np.array([expand(row, num_coefficients) for row in (x - mean) / scale])
        model = LogisticRegression(C=1.0, max_iter=1000).fit(terms, y)
        coef, intercept = model.coef_[0], float(model.intercept_[0])
    pair = (float(mean[0]), float(mean[1])), (float(scale[0]), float(scale[1]))
    return Chance(*pair, tuple(float(weight) for weight in coef), intercept)


def _ordered(
    chances: Mapping[str, Chance],
    trials: Sequence[TrialScores],
    floor: float,
    costs: Mapping[str, float],
    grid_scale: int,
) -> list[float]:
    """Candidate thresholds, fewest misses on these trials first; what another beats or equals in both is left out."""
    seen: list[tuple[int, float, float]] = []
    for threshold in THRESHOLDS:
        decided = _decide(ChanceTable(chances, threshold), trials, grid_scale)
        misses = sum(trial.ssim[choice] < floor for trial, choice in decided)
        seen.append((misses, sum(costs[choice] for _, choice in decided), threshold))
    ordered: list[float] = []
    cheapest = float("inf")
    for _misses, cost, threshold in sorted(seen, key=lambda entry: (entry[0], entry[1], -entry[2])):
        if cost < cheapest:
            ordered.append(threshold)
            cheapest = cost
    return ordered


def _decide(table: ChanceTable, trials: Sequence[TrialScores], grid_scale: int) -> list[tuple[TrialScores, str]]:
    return [(trial, table.choose(row)[0]) for trial, row in zip(trials, features(trials, grid_scale), strict=True)]


def policy_content(
    parts: Parts,
    found: tuple[ChanceTable, Certificate],
    costs: Mapping[str, float],
    grid_scale: int,
    *,
    name: str,
    fitted_for: Mapping[str, Any],
) -> dict[str, Any]:
    """The policy file of what `certify` found: decision, promise, evidence, and what all of it holds for.

    The promise is about all images together; shares by strategy and by prompt group are reported because it says
    nothing of them.
    """
    table, certificate = found
    decided = _decide(table, parts.test, grid_scale)
    floor = certificate.ssim_floor
    scores = np.array([trial.ssim[choice] for trial, choice in decided])
    return {
        "kind": "certified",
        "name": name,
        "promise": certificate.promise,
        "fitted_for": dict(fitted_for),
        "probe": {"features": ["sobel_change", "fft_high_frequency_ratio"], "grid_scale": grid_scale},
        "chances": table_to_json(table),
        "certificate": {
            **asdict(certificate),
            "parts": {key: _identity(getattr(parts, key), grid_scale) for key in ("fit", "order", "test")},
            "mean_ssim": round(float(scores.mean()), 4),
            "token_forwards_share": round(float(np.mean([costs[c] for _, c in decided])) / costs["base"], 4),
            "misses_by_strategy": _counts([(choice, trial.ssim[choice] < floor) for trial, choice in decided]),
            "misses_by_group": _counts([(trial.group, trial.ssim[choice] < floor) for trial, choice in decided]),
        },
    }


def _identity(trials: Sequence[TrialScores], grid_scale: int) -> dict[str, Any]:
    """How many trials a part holds, and a hash of them."""
    rows = [[trial.prompt, asdict(trial.probes[grid_scale]), dict(sorted(trial.ssim.items()))] for trial in trials]
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    return {"trials": len(trials), "prompts": len({trial.prompt for trial in trials}), "sha256": digest}


def _counts(outcomes: Sequence[tuple[str, bool]]) -> dict[str, dict[str, int]]:
    images = Counter(key for key, _ in outcomes)
    misses = Counter(key for key, missed in outcomes if missed)
    return {key: {"images": images[key], "misses": misses[key]} for key in sorted(images)}
