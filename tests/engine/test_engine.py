"""The engine against its slow twin: an image's bits depend on its own request only."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from skipvar.config import RunConfig
from skipvar.engine.build import build_engine
from skipvar.engine.engine import Engine
from skipvar.engine.twin import generate_one
from skipvar.errors import ConfigError
from skipvar.skip.strategy import STRATEGY_NAMES
from skipvar.types import Failure, Image, Request

MakeRequest = Callable[..., Request]
MakeConfig = Callable[..., RunConfig]


def run(engine: Engine, requests: Sequence[Request]) -> dict[int, Image]:
    engine.submit(requests)
    finished = engine.drain()
    assert len(finished) == len(requests) and engine.num_pending == 0
    assert all(isinstance(image, Image) for image in finished)
    return {image.request.position: image for image in finished if isinstance(image, Image)}


def assert_same(first: dict[int, Image], second: dict[int, Image]) -> None:
    assert first.keys() == second.keys()
    for position, image in first.items():
        other = second[position]
        assert image.strategy == other.strategy and image.probe == other.probe
        assert np.array_equal(image.pixels, other.pixels), f"pixels of {position} differ"


@pytest.fixture(scope="module")
def engine(run_config: MakeConfig) -> Engine:
    return build_engine(run_config(batch_size=8))


@pytest.fixture(scope="module")
def images(engine: Engine, make_request: MakeRequest) -> dict[int, Image]:
    return run(engine, [make_request(position) for position in range(24)])


def test_batch_size_and_order_do_not_matter(
    images: dict[int, Image], run_config: MakeConfig, make_request: MakeRequest
) -> None:
    alone = run(build_engine(run_config(batch_size=1)), [make_request(position) for position in range(24)])
    reversed_ = run(build_engine(run_config(batch_size=3)), [make_request(p) for p in reversed(range(24))])
    assert_same(images, alone)
    assert_same(images, reversed_)


def test_every_strategy_agrees_with_the_slow_twin(
    engine: Engine, images: dict[int, Image], make_request: MakeRequest
) -> None:
    by_strategy = {image.strategy: position for position, image in images.items()}
    assert set(by_strategy) == set(STRATEGY_NAMES)
    for strategy, position in by_strategy.items():
        twin = generate_one(engine.pipeline, make_request(position), strategy)
        assert np.array_equal(twin.pixels, images[position].pixels), strategy
        assert twin.cost_share == images[position].cost_share and twin.scales_run == images[position].scales_run


def test_fixed_strategy_runs_whole_and_agrees(
    images: dict[int, Image], run_config: MakeConfig, make_request: MakeRequest
) -> None:
    fixed = build_engine(run_config("fixed:uncond_2", batch_size=4))
    positions = [position for position, image in images.items() if image.strategy == "uncond_2"]
    made = run(fixed, [make_request(position) for position in positions])
    for position in positions:
        assert np.array_equal(made[position].pixels, images[position].pixels)
        assert made[position].probe is None
    assert set(fixed.statistics.whole) == {"uncond_2"} and not fixed.statistics.suffix


def test_statistics_account_for_everything(engine: Engine, images: dict[int, Image]) -> None:
    found = engine.statistics.to_dict()
    num_suffix = sum(count["images"] for count in found["suffix"].values())
    num_skip_3 = sum(image.strategy == "skip_3" for image in images.values())
    assert found["images"] == 24 and found["prefix"]["images"] == 24 and num_suffix == 24 - num_skip_3
    base = 2 * 680
    guided = [image for image in images.values() if any(cfg != 1 for cfg in image.request.cfg)]
    assert len(guided) == 24
    expected = sum(image.cost_share * base for image in guided)
    assert found["token_forwards_run"] == pytest.approx(expected)
    assert found["token_forwards_run"] + found["token_forwards_saved"] == 24 * base
    assert set(found["seconds"]) == {"text", "prefix", "probe", "suffix", "decode"}


def test_unguided_images_have_one_branch(engine: Engine, make_request: MakeRequest) -> None:
    request = make_request(1000, cfg=(1.0,) * 10)
    image = run(engine, [request])[1000]
    assert np.array_equal(image.pixels, generate_one(engine.pipeline, request, image.strategy).pixels)


def test_a_ratio_that_the_model_lacks_is_a_failure(engine: Engine, make_request: MakeRequest) -> None:
    engine.submit([make_request(2000, aspect_ratio=2.0)])
    (failure,) = engine.drain()
    assert isinstance(failure, Failure) and "aspect_ratio 2" in failure.message and failure.position == 2000


def test_out_of_memory_halves_the_batch_and_changes_nothing(
    images: dict[int, Image], run_config: MakeConfig, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(run_config(batch_size=8))
    for name in ("run_prefix", "run_suffix"):
        original = getattr(engine._runner, name)

        def limited(batch: Sequence[Any], *args: Any, original: Any = original) -> Any:
            if len(batch) > 2:
                batch[0].generator.seed()  # what a half-run batch leaves behind
                raise torch.OutOfMemoryError("injected")
            return original(batch, *args)

        monkeypatch.setattr(engine._runner, name, limited)
    assert_same(images, run(engine, [make_request(position) for position in range(24)]))
    assert engine.statistics.out_of_memory > 0


def test_an_image_of_numbers_that_are_not_finite_is_a_failure(
    run_config: MakeConfig, make_request: MakeRequest
) -> None:
    engine = build_engine(run_config("fixed:skip_3", batch_size=2))
    engine.pipeline.transformer.head.bias.data[0] = float("nan")
    engine.submit([make_request(0), make_request(1)])
    failures = engine.drain()
    assert all(isinstance(failure, Failure) and "finite" in failure.message for failure in failures)


def test_published_policies_decide_by_each_images_own_probe(run_config: MakeConfig, make_request: MakeRequest) -> None:
    engine = build_engine(run_config("conf/policies/infinity_2b_0.86.json", force=True, batch_size=4))
    for image in run(engine, [make_request(position) for position in range(6)]).values():
        assert image.probe is not None
        decision = engine.policy.decide(image.request, image.probe.numbers)
        assert decision.strategy == image.strategy and decision.scores == image.strategy_scores


def test_a_policy_of_another_model_is_refused(run_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"fitted for another model.*policy_force"):
        build_engine(run_config("conf/policies/infinity_2b_0.86.json"))


def test_self_check_stands_in_the_report(engine: Engine) -> None:
    report = engine.report
    assert report.self_check is not None and report.self_check["is_invariant"]
    assert report.pool_images >= report.batch_size["prefix"] == 8


def test_pixels_that_are_no_numbers_are_a_failure(run_config: MakeConfig, make_request: MakeRequest) -> None:
    """A VAE with broken weights: nothing of it is delivered as an image."""
    engine = build_engine(run_config("fixed:skip_1", batch_size=2))
    with torch.no_grad():
        for weights in engine.pipeline.decoder.parameters():
            weights.fill_(float("nan"))
    engine.submit([make_request(position) for position in range(3)])
    failures = engine.drain()
    assert len(failures) == 3 and engine.num_pending == 0
    assert all(isinstance(failure, Failure) and "pixels that are not finite" in failure.message for failure in failures)
