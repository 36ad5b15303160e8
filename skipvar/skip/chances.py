"""The chance of each strategy to stay above an SSIM floor, foretold from the probe. Plain Python."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


def loss_exponent(ssim: float) -> float:
    """-log(1 - SSIM), which spreads out the values near 1 and is foretold better than SSIM; equal images give 9.2."""
    return -math.log(max(1 - ssim, 1e-4))


@dataclass(frozen=True)
class Scaling:
    """How the probe's numbers are standardised."""

    mean: tuple[float, ...]
    scale: tuple[float, ...]

    def terms(self, numbers: Sequence[float]) -> tuple[float, ...]:
        """What a forecast's coefficients multiply: the standardised numbers, their squares, and of two their product.

        A cell far from its mean in either way (a strong colour, an edge) is foretold by the square.
        """
        z = tuple((value - mean) / scale for value, mean, scale in zip(numbers, self.mean, self.scale, strict=True))
        return (*z, z[0] * z[0], z[0] * z[1], z[1] * z[1]) if len(z) == 2 else (*z, *(value * value for value in z))

    @property
    def num_terms(self) -> int:
        """Length of what `terms` returns: 5 for two numbers, else two for each."""
        return 5 if len(self.mean) == 2 else 2 * len(self.mean)


@dataclass(frozen=True)
class Forecast:
    """Of one strategy: `loss_exponent` of its SSIM to `base`, normal around a mean that is linear in the terms."""

    coef: tuple[float, ...]
    intercept: float
    spread: float
    """Standard deviation of what the mean leaves open, seen on held-out prompts."""

    def chance(self, terms: Sequence[float], floor: float) -> float:
        """That the SSIM is at least the floor, in [0, 1]."""
        if len(terms) != len(self.coef):  # `map` would stop at the shorter one
            raise ValueError(f"{len(self.coef)} coefficients, but {len(terms)} terms")
        mean = self.intercept + sum(map(operator.mul, self.coef, terms))
        return 0.5 * math.erfc((loss_exponent(floor) - mean) / self.spread / math.sqrt(2))


@dataclass(frozen=True)
class ChanceTable:
    """The cheapest strategy whose chance to stay above the floor is at least the threshold; `base` where none is."""

    floor: float
    scaling: Scaling
    forecasts: Mapping[str, Forecast]
    """By strategy, cheapest first; `base` is not among them: its chance is 1."""
    threshold: float
    """Above 1: always `base`."""

    def chances(self, numbers: Sequence[float]) -> dict[str, float]:
        """By strategy, cheapest first, `base` at last."""
        terms = self.scaling.terms(numbers)
        found = {strategy: forecast.chance(terms, self.floor) for strategy, forecast in self.forecasts.items()}
        return {**found, "base": 1.0}

    def choose(self, numbers: Sequence[float]) -> tuple[str, dict[str, float]]:
        """The strategy, and every strategy's chance. A probe that is not finite says nothing: `base`."""
        if not all(math.isfinite(value) for value in numbers):
            return "base", {}
        chances = self.chances(numbers)
        return cheapest_above(chances, self.threshold), chances


def cheapest_above(chances: Mapping[str, float], threshold: float) -> str:
    """The first strategy whose chance is at least the threshold; `base` where none is."""
    return next((strategy for strategy, chance in chances.items() if chance >= threshold), "base")


def table_to_json(table: ChanceTable) -> dict[str, Any]:
    """The table as a policy file holds it."""
    forecasts = [{"strategy": strategy, **asdict(forecast)} for strategy, forecast in table.forecasts.items()]
    return {
        "floor": table.floor,
        "threshold": table.threshold,
        **asdict(table.scaling),
        "cheapest_first": forecasts,
    }


def table_from_json(content: Mapping[str, Any]) -> ChanceTable:
    """A table out of a policy file; raises `ValueError`, `KeyError` or `TypeError` where it is not one."""
    scaling = Scaling(finite(content["mean"]), finite(content["scale"]))
    if len(scaling.mean) != len(scaling.scale) or not scaling.mean or min(scaling.scale) <= 0:
        raise ValueError("mean and scale must have a number each for every number of the probe, scales positive")
    forecasts: dict[str, Forecast] = {}
    for entry in content["cheapest_first"]:
        intercept, spread = finite([entry["intercept"], entry["spread"]])
        forecast = Forecast(finite(entry["coef"]), intercept, spread)
        if len(forecast.coef) != scaling.num_terms or spread <= 0:
            raise ValueError(f"a forecast has {scaling.num_terms} coefficients and a positive spread")
        if entry["strategy"] in forecasts:
            raise ValueError(f"strategy {entry['strategy']} stands twice")
        forecasts[str(entry["strategy"])] = forecast
    floor, threshold = finite([content["floor"], content["threshold"]])
    if not (threshold > 0 and floor <= 1):
        raise ValueError("the threshold must be above 0, the floor at most 1")
    return ChanceTable(floor, scaling, forecasts, threshold)


def finite(values: Sequence[Any]) -> tuple[float, ...]:
    """Numbers of a policy file; raises `ValueError` or `TypeError` where they are none, or not finite."""
    found = tuple(float(value) for value in values)
    if not all(math.isfinite(value) for value in found):
        raise ValueError("its numbers must be finite")
    return found
