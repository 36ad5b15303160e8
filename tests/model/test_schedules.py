"""Schedules: the reference's tables, the nearest ratio, and ratios that a model lacks."""

import json
from pathlib import Path

import pytest

from skipvar.errors import RowError
from skipvar.model.schedules import EMOJI_SCHEDULES, INFINITY_SCHEDULES, find_schedule

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "schedules.json").read_text())


def test_all_ratios_are_the_golden_ones() -> None:
    assert INFINITY_SCHEDULES.grids.keys() == GOLDEN.keys()
    for ratio, schedule in GOLDEN.items():
        assert [list(grid) for grid in INFINITY_SCHEDULES.grids[ratio]] == [[h, w] for _, h, w in schedule]


@pytest.mark.parametrize(
    ("asked", "ratio"),
    [(1, "1.0"), (1.1, "1.0"), (16 / 9, "1.75"), (9 / 16, "0.571"), (0.35, "0.333"), (2 / 3, "0.666"), (3.4, "3.0")],
)
def test_the_nearest_ratio(asked: float, ratio: str) -> None:
    assert find_schedule(INFINITY_SCHEDULES, asked, None).ratio == ratio


@pytest.mark.parametrize("asked", [0, -1.0, 5.0, 0.2, float("nan"), float("inf")])
def test_ratios_that_the_model_lacks(asked: float) -> None:
    with pytest.raises(RowError, match="aspect_ratio"):
        find_schedule(INFINITY_SCHEDULES, asked, None)


def test_the_embedded_model_is_square() -> None:
    schedule = find_schedule(EMOJI_SCHEDULES, 1.0, None)
    assert schedule.num_scales == 10 and schedule.first_token(10) == 680
    with pytest.raises(RowError, match=r"one of the model's: 1\.0"):
        find_schedule(EMOJI_SCHEDULES, 1.5, None)


@pytest.mark.parametrize(("size", "num_scales"), [("0.06M", 7), ("0.25M", 10), ("0.60M", 12), ("1M", 13), (None, 13)])
def test_sizes_cut_the_list(size: str | None, num_scales: int) -> None:
    schedule = find_schedule(INFINITY_SCHEDULES, 1.0, size)
    assert schedule.num_scales == num_scales
    assert schedule.reference_grid == (64, 64)
    assert schedule.num_tokens[6] == 256 and schedule.first_token(3) == 21
