"""Fitting: labels as the paper's, a policy that separates what can be separated, the grid that predicts."""

import json
from pathlib import Path

import numpy as np
import pytest

from skipvar.skip.calibration import choose_grid, fit_policy, labels, rank_correlations
from skipvar.skip.features import DecodedProbe
from skipvar.skip.policy_file import ModelFacts, load_policy
from skipvar.skip.strategy import STRATEGY_NAMES
from skipvar.types import Probe, Trial

FITTED_FOR = {"model": "emoji", "num_scales": 10, "decision_scale": 6, "weights_sha256": {"transformer": "ab"}}


def trial(change: float, noise: float, **ssim: float) -> Trial:
    scores = dict.fromkeys(STRATEGY_NAMES, 1.0) | ssim
    probe = Probe(sobel_change=change, fft_high_frequency_ratio=0.5 + 0.1 * change)
    blind = Probe(sobel_change=noise, fft_high_frequency_ratio=0.5)
    return Trial(probes={4: blind, 9: probe}, ssim=scores)


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    """SSIM falls with the probe of grid 9; the probe of grid 4 says nothing."""
    chance = np.random.default_rng(0)
    made = []
    for change in chance.uniform(0, 1, 200):
        skip = {f"skip_{count}": 1 - 0.12 * count * change for count in (1, 2, 3)}
        uncond = {f"uncond_{count}": 1 - 0.06 * count * change for count in (1, 2, 3)}
        made.append(trial(float(change), float(chance.normal()), **skip, **uncond))
    return made


def test_labels_skip_as_much_as_the_floor_allows() -> None:
    found = labels([trial(0, 0), trial(0, 0, skip_2=0.8), trial(0, 0, skip_1=0.8)], "skip", 0.86)
    assert found.tolist() == [3, 1, 0]


def test_the_grid_that_predicts_is_chosen(trials: list[Trial]) -> None:
    grid, losses = choose_grid(trials, [0.86])
    assert grid == 9 and losses[9] < 0.6 * losses[4]
    assert rank_correlations(trials, 9)["spearman_sobel"] == [-1.0, -1.0, -1.0]


def test_a_fitted_policy_keeps_the_floor_and_loads(trials: list[Trial], tmp_path: Path) -> None:
    content = fit_policy(trials, 0.86, 9, name="emoji_0.86", fitted_for=FITTED_FOR)
    assert content["fit"]["mean_ssim"] > 0.86 and content["fit"]["share_under_floor"] < 0.1
    assert set(content["fit"]["strategies"]) >= {"skip_1", "skip_2", "skip_3"}
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(content))
    policy = load_policy(str(path), ModelFacts("emoji", 10, {"transformer": "ab"}))
    assert policy.probe == DecodedProbe(9) and policy.decision_scale == 6


@pytest.mark.parametrize("kept", [{0}, {0, 2}])
def test_few_classes_are_enough(kept: set[int]) -> None:
    made = [trial(0.0 if index % 2 else 1.0, 0, skip_3=0.5 if 2 in kept and index % 2 else 1.0) for index in range(20)]
    content = fit_policy(made, 0.86, 9, name="x", fitted_for=FITTED_FOR)
    assert sum(content["fit"]["strategies"].values()) == 20
    assert content["fit"]["share_under_floor"] == 0
