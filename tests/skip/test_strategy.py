"""Strategies are data: a mode for each scale of any schedule."""

import itertools

import pytest

from skipvar.skip.strategy import (
    PAPER_STRATEGIES,
    STRATEGY_NAMES,
    Mode,
    Strategy,
    default_decision_scale,
    make_strategy,
)

G, C, S = Mode.GUIDED, Mode.CONDITIONAL, Mode.SKIPPED
SQUARE = [1, 4, 16, 36, 64, 144, 256, 400, 576, 1024, 1600, 2304, 4096]


def test_skipping_comes_after_dropping_the_unconditional_branch() -> None:
    assert make_strategy("skip_1_uncond_1", 5).modes == (G, G, G, C, S)
    assert make_strategy("skip_1_uncond_2", 5).modes == (G, G, C, C, S)
    assert make_strategy("skip_2_uncond_1", 5).modes == (G, G, C, S, S)


def test_all_ways_to_go_down_over_the_decided_scales_have_a_name() -> None:
    modes = {make_strategy(name, 4).modes for name in STRATEGY_NAMES}
    assert modes == {(G, *rest) for rest in itertools.combinations_with_replacement(Mode, 3)} and len(modes) == 10


def test_the_seven_of_the_paper() -> None:
    assert PAPER_STRATEGIES == ("base", "skip_1", "skip_2", "skip_3", "uncond_1", "uncond_2", "uncond_3")
    assert make_strategy("base", 5).modes == (G, G, G, G, G)
    assert make_strategy("skip_2", 5).modes == (G, G, G, S, S)
    assert make_strategy("uncond_3", 5).modes == (G, G, C, C, C)
    assert make_strategy("skip_2", 5).num_scales_run == 3
    assert [make_strategy(name, 13).name for name in STRATEGY_NAMES] == list(STRATEGY_NAMES)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("base", 2 * 10521),
        ("skip_1", 2 * 6425),
        ("skip_2", 2 * 4121),
        ("skip_3", 2 * 2521),
        ("uncond_1", 16946),
        ("uncond_2", 14642),
        ("uncond_3", 13042),
        ("skip_1_uncond_1", 2 * 4121 + 2304),
        ("skip_1_uncond_2", 2 * 2521 + 1600 + 2304),
        ("skip_2_uncond_1", 2 * 2521 + 1600),
    ],
)
def test_token_forwards_are_those_of_the_reference(name: str, tokens: int) -> None:
    assert make_strategy(name, 13).token_forwards(SQUARE) == tokens


def test_token_forwards_without_guidance_count_one_branch() -> None:
    assert make_strategy("uncond_2", 13).token_forwards(SQUARE, guided=False) == 10521
    assert make_strategy("skip_3", 13).token_forwards(SQUARE, guided=False) == 2521


@pytest.mark.parametrize("name", ["skip_4", "uncond_0", "skip", "", "base_1", "Skip_1", "skip_2_uncond_2"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match="unknown strategy"):
        make_strategy(name, 13)


def test_schedules_that_are_too_short() -> None:
    assert make_strategy("skip_3", 4).modes == (G, S, S, S)
    with pytest.raises(ValueError, match="needs more than 3 scales"):
        make_strategy("skip_3", 3)


@pytest.mark.parametrize("modes", [(), (S,), (G, S, G), (C, G), (G, S, C), (S, S)])
def test_modes_only_go_down(modes: tuple[Mode, ...]) -> None:
    with pytest.raises(ValueError, match="its modes must go"):
        Strategy("own", modes)


def test_a_strategy_of_its_own() -> None:
    assert Strategy("own", (G, C, C, S)).token_forwards([1, 10, 100, 1000]) == 2 + 10 + 100


def test_the_decision_comes_before_the_last_three_scales() -> None:
    assert default_decision_scale(13) == 9
    assert default_decision_scale(10) == 6
    assert default_decision_scale(5) == 1
    assert default_decision_scale(4) is None
