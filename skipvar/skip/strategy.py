"""Strategies: for every scale of a schedule, whether it runs guided, conditional, or not at all. Plain data."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache

NUM_DECIDED_SCALES = 3
"""The last scales, over which strategies differ; the decision scale comes right before them."""


class Mode(Enum):
    """How one scale of one image runs."""

    GUIDED = "guided"
    """Conditional and unconditional branch."""
    CONDITIONAL = "conditional"
    """The conditional branch alone."""
    SKIPPED = "skipped"


def num_scales_run(modes: Sequence[Mode]) -> int:
    """How many of the scales run at all: the first so many."""
    return sum(mode is not Mode.SKIPPED for mode in modes)


@dataclass(frozen=True)
class Strategy:
    """A name and a mode for each of K scales. Once a scale is conditional or skipped, no later one is guided."""

    name: str
    modes: tuple[Mode, ...]

    def __post_init__(self) -> None:
        ranks = [list(Mode).index(mode) for mode in self.modes]
        if not self.modes or self.modes[0] is Mode.SKIPPED or ranks != sorted(ranks):
            raise ValueError(f"strategy {self.name}: its modes must go from guided over conditional to skipped")

    @property
    def num_scales_run(self) -> int:
        """Index of the first scale that is skipped; K where none is."""
        return num_scales_run(self.modes)

    def token_forwards(self, num_tokens: Sequence[int], *, guided: bool = True) -> int:
        """Tokens that go through the transformer, both branches counted; `num_tokens`: of each scale.

        Without guidance (a cfg of 1 at every scale) there is one branch throughout.
        """
        branches = {Mode.GUIDED: 2 if guided else 1, Mode.CONDITIONAL: 1, Mode.SKIPPED: 0}
        return sum(branches[mode] * tokens for mode, tokens in zip(self.modes, num_tokens, strict=True))


CHANGED_SCALES = {
    "base": (0, 0),
    "skip_1": (1, 0),
    "skip_2": (2, 0),
    "skip_3": (3, 0),
    "uncond_1": (0, 1),
    "uncond_2": (0, 2),
    "uncond_3": (0, 3),
    "skip_1_uncond_1": (1, 1),
    "skip_1_uncond_2": (1, 2),
    "skip_2_uncond_1": (2, 1),
}
"""Of each strategy: how many last scales are skipped, and how many before them run without the unconditional branch."""
assert all(sum(counts) <= NUM_DECIDED_SCALES for counts in CHANGED_SCALES.values()), "the prefix has run all others"
STRATEGY_NAMES = tuple(CHANGED_SCALES)
PAPER_STRATEGIES = tuple(name for name, counts in CHANGED_SCALES.items() if 0 in counts)
"""Those among which SkipVAR's own policies choose: they skip, or drop the unconditional branch, and never both."""


@cache
def make_strategy(name: str, num_scales: int) -> Strategy:
    """A strategy by its name, for a schedule of `num_scales`."""
    if name not in CHANGED_SCALES:
        raise ValueError(f"unknown strategy {name!r} (one of {', '.join(STRATEGY_NAMES)})")
    num_skipped, num_conditional = CHANGED_SCALES[name]
    num_changed = num_skipped + num_conditional
    if num_changed >= num_scales:
        raise ValueError(f"strategy {name} needs more than {num_changed} scales, the schedule has {num_scales}")
    changed = (Mode.CONDITIONAL,) * num_conditional + (Mode.SKIPPED,) * num_skipped
    return Strategy(name, (Mode.GUIDED,) * (num_scales - num_changed) + changed)


def default_decision_scale(num_scales: int) -> int | None:
    """Index of the scale after which the probe is taken: K-4 of K (9 of 13); None where no scale comes before it."""
    scale = num_scales - NUM_DECIDED_SCALES - 1
    return scale if scale >= 1 else None
