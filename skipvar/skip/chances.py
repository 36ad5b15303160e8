"""The chance of each strategy to stay above an SSIM floor, given the probe. Plain Python: no pickle, no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def expand(z: Sequence[float], num_coefficients: int) -> tuple[float, ...]:
    """What the coefficients multiply: the two standardised features, and where there are five, their products too."""
    first, second = z
    terms = (first, second, first * first, first * second, second * second)
    return terms[:num_coefficients]


@dataclass(frozen=True)
class Chance:
    """Logistic regression of "SSIM to `base` is at least the floor" on the standardised probe, for one strategy."""

    mean: tuple[float, float]
    scale: tuple[float, float]
    coef: tuple[float, ...]
    """Two (monotone in each feature) or five (with squares and the product)."""
    intercept: float

    def __call__(self, features: Sequence[float]) -> float:
        """In (0, 1). Features in the file's order: Sobel change, FFT ratio."""
        z = [(value - mean) / scale for value, mean, scale in zip(features, self.mean, self.scale, strict=True)]
        terms = expand(z, len(self.coef))
        score = self.intercept + sum(weight * term for weight, term in zip(self.coef, terms, strict=True))
        return 1 / (1 + math.exp(-score)) if score >= 0 else 1 - 1 / (1 + math.exp(score))


@dataclass(frozen=True)
class ChanceTable:
    """The cheapest strategy whose chance is at least the threshold; `base` where none is."""

    chances: Mapping[str, Chance]
    """By strategy, cheapest first; `base` is not among them: its chance is 1."""
    threshold: float
    """Above 1: always `base`."""

    def choose(self, features: Sequence[float]) -> tuple[str, dict[str, float]]:
        """The strategy, and every strategy's chance. A probe that is not finite says nothing: `base`."""
        if not all(math.isfinite(value) for value in features):
            return "base", {}
        scores = {strategy: chance(features) for strategy, chance in self.chances.items()}
        chosen = next((strategy for strategy, score in scores.items() if score >= self.threshold), "base")
        return chosen, {**scores, "base": 1.0}


def table_to_json(table: ChanceTable) -> dict[str, Any]:
    """The table as a policy file holds it."""
    strategies = [
        {
            "strategy": strategy,
            "coef": list(chance.coef),
            "intercept": chance.intercept,
            "mean": list(chance.mean),
            "scale": list(chance.scale),
        }
        for strategy, chance in table.chances.items()
    ]
    return {"threshold": table.threshold, "cheapest_first": strategies}


def table_from_json(content: Mapping[str, Any]) -> ChanceTable:
    """A table out of a policy file; raises `ValueError`, `KeyError` or `TypeError` where it is not one."""
    chances: dict[str, Chance] = {}
    for entry in content["cheapest_first"]:
        (mean_0, mean_1), (scale_0, scale_1) = entry["mean"], entry["scale"]
        chance = Chance(
            mean=(float(mean_0), float(mean_1)),
            scale=(float(scale_0), float(scale_1)),
            coef=tuple(float(value) for value in entry["coef"]),
            intercept=float(entry["intercept"]),
        )
        numbers = [*chance.mean, *chance.scale, *chance.coef, chance.intercept]
        if not all(math.isfinite(number) for number in numbers) or min(chance.scale) <= 0:
            raise ValueError("a chance's numbers must be finite and its scale positive")
        if len(chance.coef) not in (2, 5):
            raise ValueError("a chance has two or five coefficients")
        if entry["strategy"] in chances:
            raise ValueError(f"strategy {entry['strategy']} stands twice")
        chances[str(entry["strategy"])] = chance
    threshold = float(content["threshold"])
    if not threshold > 0:
        raise ValueError("the threshold must be above 0")
    return ChanceTable(chances, threshold)
