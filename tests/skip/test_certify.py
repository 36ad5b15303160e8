"""Certified policies: what is promised holds on prompts that nobody saw, and what was not tested is refused."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skipvar.errors import ConfigError
from skipvar.skip.certify import allowed_misses, certify, one_each, p_value, policy_content, split_by_prompt
from skipvar.skip.features import DecodedProbe, LatentProbe
from skipvar.skip.policy import Conditions, Promise
from skipvar.skip.policy_file import ModelFacts, load_policy
from skipvar.types import Probe, Request, Trial

PROMISE = Promise(0.84, alpha=0.1, delta=0.05)
COSTS = {"base": 100.0, "uncond_1": 80.0, "skip_1": 70.0, "skip_2": 50.0, "skip_3": 30.0}
LOSS = {"base": 0.0, "uncond_1": 0.05, "skip_1": 0.1, "skip_2": 0.18, "skip_3": 0.3}
GRIDS = tuple((side, side) for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
CONDITIONS = Conditions(
    cfg=(2.0,) * 10, tau=(0.3,) * 10, top_k=900, top_p=0.97, negative_prompt=None, cfg_insertion_layers=(0,),
    dtype="float32", grids=GRIDS,
)  # fmt: skip
FACTS = ModelFacts("emoji", 10, {"transformer": "ab"}, CONDITIONS)
FITTED_FOR = {
    "model": "emoji", "num_scales": 10, "decision_scale": 6, "weights_sha256": {"transformer": "ab"},
    **asdict(CONDITIONS), "aspect_ratio": 1.0,
}  # fmt: skip


def world(num_prompts: int, seed: int, images: int = 1, *, signal: bool = True) -> list[Trial]:
    """SSIM falls with an image's fineness, which the probe shows, and with its prompt's own difficulty."""
    chance = np.random.default_rng(seed)
    made = []
    for prompt in range(num_prompts):
        difficulty = chance.normal(0, 0.04)
        for _ in range(images):
            fineness = chance.uniform()
            noise = chance.normal(0, 0.02)
            ssim = {name: 1 - loss * fineness + (difficulty + noise if loss else 0) for name, loss in LOSS.items()}
            shown = fineness if signal else chance.uniform()
            probe = Probe(sobel_change=shown, fft_high_frequency_ratio=chance.normal())
            made.append(Trial(probes={6: probe}, ssim=ssim, prompt=f"p{prompt:05d}", group=f"g{prompt % 2}"))
    return made


def test_the_binomial_bound_is_exact() -> None:
    assert allowed_misses(640, 0.1, 0.05) == 51  # the issue's own example
    assert p_value(51, 640, 0.1) <= 0.05 < p_value(52, 640, 0.1)
    assert allowed_misses(28, 0.1, 0.05) == -1 and allowed_misses(29, 0.1, 0.05) == 0  # 0.9 ** 29 < 0.05
    assert p_value(0, 29, 0.1) == pytest.approx(0.9**29)


def test_prompts_are_never_split_and_the_test_part_holds_one_image_of_each() -> None:
    parts = split_by_prompt(world(100, 0, images=3), seed=5)
    fit, order, test = ({trial.prompt for trial in part} for part in (parts.fit, parts.order, parts.test))
    assert not fit & order and not fit & test and not order & test and len(fit | order | test) == 100
    assert len(parts.test) == len(test) and len(parts.fit) == 3 * len(fit)
    assert split_by_prompt(world(100, 0, images=3), seed=5) == parts != split_by_prompt(world(100, 0, 3), seed=6)


def test_the_image_of_a_prompt_is_drawn_whatever_its_scores() -> None:
    trials = world(50, 0, images=4)
    turned = [replace(trial, ssim={k: 1 - v for k, v in trial.ssim.items()}) for trial in trials]
    kept, kept_turned = (one_each(some, np.random.default_rng(3)) for some in (trials, turned))
    assert [trial.probes for trial in kept] == [trial.probes for trial in kept_turned]


@pytest.mark.parametrize("signal", [True, False])
def test_the_rate_stays_under_alpha_on_prompts_that_nobody_saw(signal: bool) -> None:
    """Clustered trials: in at least 95% of the splits the true rate of what was certified is at most alpha."""
    splits = 20
    unseen = world(2000, 999, signal=signal)
    rates, shares = [], []
    for split in range(splits):
        found = certify(split_by_prompt(world(400, split, 2, signal=signal), split), PROMISE, COSTS)
        if found is not None:
            chosen = found.choose(unseen)
            rates.append(np.mean([t.ssim[name] < PROMISE.floor for t, name in zip(unseen, chosen, strict=True)]))
            shares.append(np.mean([COSTS[name] for name in chosen]))
    assert len(rates) == splits  # base always passes: something always can
    assert sum(rate <= PROMISE.alpha + 0.007 for rate in rates) >= 0.95 * splits, rates
    if signal:
        assert np.mean(shares) < COSTS["skip_1"] and max(rates) > 0.02  # and it is worth something


def test_the_probe_that_foretells_better_is_chosen() -> None:
    """Here the latents tell everything, and the decoded probe nothing."""
    blind = world(400, 7, signal=False)
    told = [replace(trial, latents=[(1 - trial.ssim["skip_3"]) / 0.3] * 16) for trial in blind]
    seen, unseen = (certify(split_by_prompt(trials, 7), PROMISE, COSTS) for trials in (told, blind))
    assert seen is not None and unseen is not None
    assert isinstance(seen.rule, LatentProbe) and unseen.rule == DecodedProbe(6)
    assert set(seen.losses) == {"decoded at scale 6", "latents 1x1", "latents 2x2", "latents 4x4"}
    cost_seen, cost_unseen = (np.mean([COSTS[name] for name in found.choose(told)]) for found in (seen, unseen))
    assert cost_seen < 0.8 * cost_unseen


def test_no_image_too_few_nothing_certified() -> None:
    assert certify(split_by_prompt(world(20, 0), 0), PROMISE, COSTS) is None


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    parts = split_by_prompt(world(600, 1), 1)
    found = certify(parts, PROMISE, COSTS)
    assert found is not None
    return policy_content(parts, found, COSTS, name="emoji_certified", fitted_for=FITTED_FOR)


def test_the_file_tells_its_promise_and_its_evidence(content: dict[str, Any]) -> None:
    evidence = content["certificate"]
    assert (evidence["ssim_floor"], evidence["alpha"], evidence["delta"], evidence["n"]) == (0.84, 0.1, 0.05, 300)
    assert 0 < evidence["misses"] <= allowed_misses(300, 0.1, 0.05)
    assert sum(group["misses"] for group in evidence["misses_by_group"].values()) == evidence["misses"]
    assert sum(entry["images"] for entry in evidence["misses_by_strategy"].values()) == 300
    assert len({part["sha256"] for part in evidence["parts"].values()}) == 3
    assert content["promise"].startswith("with confidence 0.95 at most 0.1 of images")


def test_a_certified_file_loads_and_decides_as_it_was_tested(
    content: dict[str, Any], tmp_path: Path, make_request: Callable[..., Request]
) -> None:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(content))
    policy = load_policy(str(path), FACTS)
    assert (policy.probe, policy.decision_scale, policy.known_strategy) == (DecodedProbe(6), 6, None)
    request = make_request(1, cfg=(2.0,) * 10, tau=(0.3,) * 10)
    easy, hard = (0.0, 0.0), (1.0, 0.0)
    assert policy.decide(request, easy).strategy == "skip_3" and policy.decide(request, hard).strategy != "skip_3"
    assert policy.decide(request, (float("nan"), 0.0)).strategy == "base"
    assert policy.decide(make_request(1, cfg=(3.0,) * 10, tau=(0.3,) * 10), easy).strategy == "base"
    assert policy.decide(replace(request, aspect_ratio=0.5), easy).strategy == "base"
    assert policy.decide(replace(request, negative_prompt="blurry"), easy).strategy == "base"
    scores = policy.decide(request, easy).scores
    assert scores is not None and scores["base"] == 1.0 and all(0 <= score <= 1 for score in scores.values())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"weights_sha256": {"transformer": "cd"}}, "another transformer weights"),
        ({"cfg": (3.0,) * 10}, "nothing for this cfg (tested with 2.0, this run has 3.0)"),
        ({"tau": (0.5,) * 10}, "nothing for this tau"),
        ({"dtype": "bfloat16"}, "nothing for this dtype (tested with float32, this run has bfloat16)"),
        ({"num_scales": 9}, "another number of scales"),
        ({"name": "infinity_2b"}, "another model"),
        ({"cfg": (2.0, 3.0) * 5}, "nothing for this cfg (tested with 2.0, this run has (2.0, 3.0, "),
        ({"grids": ((1, 1),) * 10}, "nothing for this schedule (tested with 1x1 2x2 3x3"),
        ({"top_k": 1}, "nothing for this top_k (tested with 900, this run has 1)"),
        ({"top_p": 0.5}, "nothing for this top_p"),
        ({"negative_prompt": "blurry"}, "nothing for this negative_prompt (tested with None, this run has blurry)"),
        ({"cfg_insertion_layers": (0, -2)}, "nothing for this cfg_insertion_layers"),
    ],
)
def test_another_run_is_refused_in_one_sentence(
    content: dict[str, Any], tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(content))
    of_model = {key: value for key, value in changed.items() if key in FACTS.__dict__}
    of_run = {key: value for key, value in changed.items() if key not in of_model}
    other = replace(FACTS, **of_model, conditions=replace(CONDITIONS, **of_run))
    with pytest.raises(ConfigError, match="policy") as error:
        load_policy(str(path), other)
    assert said in str(error.value) and "\n" not in str(error.value)
    if changed.get("num_scales") is None:
        assert load_policy(str(path), other, force=True).name == "emoji_certified"


def _without_dtype(content: dict[str, Any]) -> None:
    del content["fitted_for"]["dtype"]


def _unknown_strategy(content: dict[str, Any]) -> None:
    content["chances"]["cheapest_first"][0]["strategy"] = "skip_9"


def _infinite(content: dict[str, Any]) -> None:
    content["chances"]["cheapest_first"][0]["coef"][0] = float("inf")


def _three_coefficients(content: dict[str, Any]) -> None:
    content["chances"]["cheapest_first"][0]["coef"] = [1, 2, 3]


def _no_spread(content: dict[str, Any]) -> None:
    content["chances"]["cheapest_first"][0]["spread"] = 0


def _odd_side(content: dict[str, Any]) -> None:
    content["probe"] = {"features": ["latent_means"], "side": 3}


def _odd_grids(content: dict[str, Any]) -> None:
    content["fitted_for"]["grids"] = [1, 2]


def _later_decision(content: dict[str, Any]) -> None:
    content["fitted_for"]["decision_scale"] = 7


def _earlier_decision(content: dict[str, Any]) -> None:
    content["fitted_for"]["decision_scale"] = 5


@pytest.mark.parametrize(
    "change",
    [
        _without_dtype,
        _unknown_strategy,
        _infinite,
        _three_coefficients,
        _no_spread,
        _odd_side,
        _odd_grids,
        _later_decision,
        _earlier_decision,
    ],
)
def test_a_broken_file_is_refused(
    content: dict[str, Any], tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    broken = json.loads(json.dumps(content))
    change(broken)
    (tmp_path / "policy.json").write_text(json.dumps(broken))
    with pytest.raises(ConfigError):
        load_policy(str(tmp_path / "policy.json"), FACTS)
