"""What a strategy for each trial's image comes to, and what mixtures of fixed strategies would."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from skipvar.types import Trial

Point = tuple[float, float]


@dataclass(frozen=True)
class Tally:
    """Of images that were each made under one strategy."""

    ssim: np.ndarray
    """`(images,)` float64: to `base`."""
    misses: int
    """Images under the floor."""
    cost_share: float
    """Mean token-forwards over those of `base`."""

    @property
    def images(self) -> int:
        return len(self.ssim)

    @property
    def share(self) -> float:
        """Of images under the floor."""
        return self.misses / self.images

    @property
    def mean_ssim(self) -> float:
        return float(self.ssim.mean())


def tally(trials: Sequence[Trial], chosen: Sequence[str], floor: float, costs: Mapping[str, float]) -> Tally:
    """Of a strategy for each trial. `costs`: token-forwards of an image by strategy."""
    ssim = np.array([trial.ssim[name] for trial, name in zip(trials, chosen, strict=True)])
    cost = float(np.mean([costs[name] for name in chosen]))
    return Tally(ssim, int((ssim < floor).sum()), cost / costs["base"])


def cheapest(points: Sequence[Point], value: float) -> float:
    """The lowest cost of a mixture of points `(cost, value)` that has at most this value (a share of misses)."""
    found = [cost for cost, at in points if at <= value]
    for (first, low), (second, high) in ((a, b) for a in points for b in points if a[1] < value < b[1]):
        found.append(first + (second - first) * (value - low) / (high - low))
    return min(found)


def best_value(points: Sequence[Point], cost: float) -> float:
    """The highest value that a mixture of points `(cost, value)` has at no more than this cost."""
    return -cheapest([(-value, at) for at, value in points], cost)


def saved_at_equal_misses(one: Tally, fixed: Sequence[Tally]) -> float:
    """By what share its token-forwards are fewer than those of the cheapest mixture of `fixed` that misses as rarely;
    to four digits."""
    return round(1 - one.cost_share / cheapest([(other.cost_share, other.share) for other in fixed], one.share), 4)
