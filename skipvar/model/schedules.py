"""Scale schedules: for an aspect ratio and a size, the token grids that the model goes through. No torch."""

import math
from dataclasses import dataclass

from skipvar.errors import RowError
from skipvar.model.config import ScheduleConfig

RATIO_TOLERANCE = 0.15
"""How far a request's ratio may be from the model's nearest one: Infinity's 15 then cover all from 0.29 to 3.4."""


@dataclass(frozen=True)
class Schedule:
    """The scales of one aspect ratio at one size."""

    ratio: str
    """Key of the aspect ratio (height / width) in the model's table."""
    size: str
    grids: tuple[tuple[int, int], ...]
    """Token grid `(h, w)` of each of the K scales."""
    reference_grid: tuple[int, int]
    """Last grid of the ratio's full list, whatever the size: positions are stretched to it."""

    @property
    def num_scales(self) -> int:
        """K; strategies may run fewer."""
        return len(self.grids)

    @property
    def num_tokens(self) -> tuple[int, ...]:
        """Tokens `h * w` of each scale."""
        return tuple(height * width for height, width in self.grids)

    def first_token(self, scale: int) -> int:
        """Tokens of all scales before this one; `first_token(num_scales)` is the total."""
        return sum(self.num_tokens[:scale])


def find_schedule(config: ScheduleConfig, aspect_ratio: float, size: str | None) -> Schedule:
    """The schedule of the model's ratio nearest to `aspect_ratio` (smallest absolute difference, as upstream).

    Raises `RowError` if no ratio is within `RATIO_TOLERANCE`, and `KeyError` for an unknown size (checked with the
    configuration).
    """
    size = size or config.default_size
    key = min(config.grids, key=lambda ratio: abs(float(ratio) - aspect_ratio))
    if not aspect_ratio > 0 or abs(math.log(aspect_ratio / float(key))) > math.log1p(RATIO_TOLERANCE):
        raise RowError(f"aspect_ratio {aspect_ratio:g} is not one of the model's: {', '.join(config.grids)}")
    full = config.grids[key]
    return Schedule(ratio=key, size=size, grids=full[: config.sizes[size]], reference_grid=full[-1])


_INFINITY_PORTRAIT: dict[str, tuple[tuple[int, int], ...]] = {
    "1.0": (
        (1, 1),
        (2, 2),
        (4, 4),
        (6, 6),
        (8, 8),
        (12, 12),
        (16, 16),
        (20, 20),
        (24, 24),
        (32, 32),
        (40, 40),
        (48, 48),
        (64, 64),
    ),
    "1.25": (
        (1, 1),
        (2, 2),
        (3, 3),
        (5, 4),
        (10, 8),
        (15, 12),
        (20, 16),
        (25, 20),
        (30, 24),
        (35, 28),
        (45, 36),
        (55, 44),
        (70, 56),
    ),
    "1.333": (
        (1, 1),
        (2, 2),
        (4, 3),
        (8, 6),
        (12, 9),
        (16, 12),
        (20, 15),
        (24, 18),
        (28, 21),
        (36, 27),
        (48, 36),
        (60, 45),
        (72, 54),
    ),
    "1.5": (
        (1, 1),
        (2, 2),
        (3, 2),
        (6, 4),
        (9, 6),
        (15, 10),
        (21, 14),
        (27, 18),
        (33, 22),
        (39, 26),
        (48, 32),
        (63, 42),
        (78, 52),
    ),
    "1.75": (
        (1, 1),
        (2, 2),
        (3, 3),
        (7, 4),
        (11, 6),
        (14, 8),
        (21, 12),
        (28, 16),
        (35, 20),
        (42, 24),
        (56, 32),
        (70, 40),
        (84, 48),
    ),
    "2.0": (
        (1, 1),
        (2, 2),
        (4, 2),
        (6, 3),
        (10, 5),
        (16, 8),
        (22, 11),
        (30, 15),
        (38, 19),
        (46, 23),
        (60, 30),
        (74, 37),
        (90, 45),
    ),
    "2.5": (
        (1, 1),
        (2, 2),
        (5, 2),
        (10, 4),
        (15, 6),
        (20, 8),
        (25, 10),
        (30, 12),
        (40, 16),
        (50, 20),
        (65, 26),
        (80, 32),
        (100, 40),
    ),
    "3.0": (
        (1, 1),
        (2, 2),
        (6, 2),
        (9, 3),
        (15, 5),
        (21, 7),
        (27, 9),
        (36, 12),
        (45, 15),
        (54, 18),
        (72, 24),
        (90, 30),
        (111, 37),
    ),
}


def _infinity_grids() -> dict[str, tuple[tuple[int, int], ...]]:
    """Portrait lists as they are; a landscape list is the portrait one transposed, its key cut to three decimals."""
    grids = dict(_INFINITY_PORTRAIT)
    for ratio, portrait in _INFINITY_PORTRAIT.items():
        if ratio != "1.0":
            landscape = str(int(1000 / float(ratio)) / 1000)
            grids[landscape] = tuple((width, height) for height, width in portrait)
    return grids


INFINITY_SCHEDULES = ScheduleConfig(
    grids=_infinity_grids(),
    sizes={"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13},
    default_size="1M",
)
"""The 15 aspect ratios of Infinity's released models (FORWARD.md section 0)."""

EMOJI_SCHEDULES = ScheduleConfig(
    grids={"1.0": tuple((side, side) for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))},
    sizes={"128": 10},
    default_size="128",
)
"""The embedded model: square, ten scales, the last three with 77% of the 680 tokens."""
