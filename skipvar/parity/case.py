"""A case of parity: what was compared, how far apart it was, and the verdict."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

LOGIT_TOLERANCE = 1e-3
"""Absolute, on guided logits: float32 reorderings give 5e-5, the subtlest mistake known 8e-3."""
PIXEL_TOLERANCE = 1
"""Of 255: the reference truncates."""
PROBE_TOLERANCE = 1e-4
"""Relative."""
SUM_TOLERANCE = 1e-4
"""Absolute, on running code sums, which only add and interpolate."""
FREE_MARGIN = 5e-4
"""Runs whose smallest margin is at least this must give the same bits on their own."""
FLIP_MARGIN = 1e-4
"""Elsewhere golden bits are fed back, and a bit may differ if it is less than this from its threshold."""


@dataclass
class Case:
    """One comparison and what came of it."""

    name: str
    problems: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    """The largest of each kind."""
    counts: Counter[str] = field(default_factory=Counter)
    """Of what was looked at; they decide nothing."""

    @property
    def passed(self) -> bool:
        """Whether no problem was noted; errors within their tolerance are none."""
        return not self.problems

    def measure(self, kind: str, value: float, tolerance: float | None = None) -> None:
        """Notes an error; beyond the tolerance it is a problem, and so is what is no number."""
        value = value if math.isfinite(value) else 1e30
        self.errors[kind] = max(value, self.errors.get(kind, 0.0))
        if tolerance is not None and not value <= tolerance:
            self.problems.append(f"{kind} is {value:.2e}, allowed is {tolerance:.0e}")

    def compare(self, kind: str, ours: Tensor, golden: Tensor, tolerance: float | None = None) -> None:
        """Measures the largest absolute difference of two tensors, which must have one shape."""
        if ours.shape != golden.shape:
            self.problems.append(f"{kind}: shape {tuple(ours.shape)}, golden has {tuple(golden.shape)}")
            return
        self.measure(kind, (ours.double() - golden.double()).abs().max().item(), tolerance)

    def expect_equal(self, what: str, ours: Any, golden: Any) -> None:
        """Notes a problem, with both values, where they differ; for plain values, not for tensors."""
        if ours != golden:
            self.problems.append(f"{what} is {ours!r}, golden is {golden!r}")

    @property
    def line(self) -> str:
        """For people: verdict, name, errors and counts, problems."""
        numbers = [f"{kind} {value:.1e}" for kind, value in self.errors.items()]
        numbers += [f"{what} {number}" for what, number in self.counts.items()]
        verdict = "ok" if self.passed else "FAILED"
        return f"{verdict:7} {self.name:40} {'; '.join([*self.problems, ', '.join(numbers)])}".rstrip(" ;")


Check = Callable[[Case], None]
"""Fills in a case."""
