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


_INFINITY_PORTRAIT = {
    "1.0": "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    "1.25": "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    "1.333": "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    "1.5": "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    "1.75": "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    "2.0": "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    "2.5": "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    "3.0": "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}
"""Ratio to the grids `height x width` of its 13 scales."""


def _infinity_grids() -> dict[str, tuple[tuple[int, int], ...]]:
    """Portrait lists as they are; a landscape list is the portrait one transposed, its key cut to three decimals."""
    grids = {}
    for ratio, text in _INFINITY_PORTRAIT.items():
        sides = [grid.split("x") for grid in text.split()]
        grids[ratio] = tuple((int(height), int(width)) for height, width in sides)
    for ratio in _INFINITY_PORTRAIT:
        if ratio != "1.0":
            grids[str(int(1000 / float(ratio)) / 1000)] = tuple((width, height) for height, width in grids[ratio])
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
