"""Trials: all strategies from one prefix, the pixels of each being those of an image made alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

import skipvar.quality.similarity
from skipvar.config import RunConfig
from skipvar.engine.build import build_engine
from skipvar.engine.trials import TrialEngine, TrialRule
from skipvar.engine.twin import generate_one
from skipvar.local import build_local_engine
from skipvar.quality.similarity import psnr, ssim
from skipvar.skip.features import LATENT_CELLS, LATENT_SIDES, LatentProbe
from skipvar.skip.policy import Decision, SpreadPolicy
from skipvar.skip.strategy import STRATEGY_NAMES
from skipvar.types import Failure, Image, Request

pytestmark = pytest.mark.usefixtures("small_emoji")


def test_a_trial_may_keep_its_pixels_and_ask_for_less(
    run_config: Callable[..., RunConfig], make_request: Callable[..., Request]
) -> None:
    rule = TrialRule(ssim, psnr, strategies=("base", "skip_2", "uncond_1"), grid_scales=(4, 9), keeps_pixels=True)
    requests = [make_request(position) for position in range(3)]
    engine = build_engine(run_config("trials", batch_size=2), rule=rule)
    engine.submit(requests)
    made = {image.request.position: image for image in engine.drain() if isinstance(image, Image)}
    trials = [made[position].trial for position in range(3)]
    assert all(trial is not None and set(trial.probes) == {4, 9} for trial in trials) and trials[0] is not None
    assert trials[0].probes[4] != trials[0].probes[9]
    for name in rule.strategies:
        twin = generate_one(engine.pipeline, requests[2], name)
        assert trials[2] is not None and np.array_equal(trials[2].pixels[name], twin.pixels), name
    assert trials[2] is not None and set(trials[2].ssim) == set(trials[2].pixels) == set(rule.strategies)


def run(config: RunConfig, requests: list[Request]) -> tuple[TrialEngine, dict[int, Image]]:
    engine = build_local_engine(config)
    assert isinstance(engine, TrialEngine)
    engine.submit(requests)
    return engine, {item.request.position: item for item in engine.drain() if isinstance(item, Image)}


def test_an_engine_s_trials_are_those_of_each_strategy_alone(
    run_config: Callable[..., RunConfig], make_request: Callable[..., Request]
) -> None:
    """Guided and unguided images, several text lengths and negative prompts, in batches that mix them."""
    requests = [make_request(position) for position in range(5)]
    requests.append(make_request(5, cfg=(1.0,) * 10))
    engine, made = run(run_config("trials", batch_size=3), requests)
    assert set(made) == set(range(6)) and engine.num_pending == 0
    for position in (0, 4, 5):
        twins = {name: generate_one(engine.pipeline, requests[position], name).pixels for name in STRATEGY_NAMES}
        image = made[position]
        assert image.trial is not None and image.strategy == "base" and not image.trial.pixels
        assert np.array_equal(image.pixels, twins["base"])
        for name, pixels in twins.items():
            pair = pixels[None], twins["base"][None]
            assert image.trial.ssim[name] == pytest.approx(float(ssim(*pair)[0]), abs=1e-5), name
            assert image.trial.psnr[name] == (None if np.array_equal(*pair) else pytest.approx(float(psnr(*pair)[0])))
        assert set(image.trial.probes) == set(image.trial.probe_seconds) == {3, 4, 5, 6, 7}
        channels = engine.pipeline.config.transformer.latent_channels
        assert len(image.trial.latents) == len(image.trial.early_latents) == channels * LATENT_CELLS**2
        assert image.trial.latents != image.trial.early_latents and image.trial.seconds["base"] > 0


def test_lpips_is_there_where_it_can_be_had(
    run_config: Callable[..., RunConfig], make_request: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    def largest(images: np.ndarray, references: np.ndarray) -> np.ndarray:
        return np.abs(images.astype(float) - references).max((1, 2, 3)) / 255

    _, plain = run(run_config("trials"), [make_request(0)])
    monkeypatch.setattr(skipvar.quality.similarity, "find_lpips", lambda: largest)
    engine, made = run(run_config("trials"), [make_request(0)])
    twins = {name: generate_one(engine.pipeline, make_request(0), name).pixels for name in STRATEGY_NAMES}
    assert plain[0].trial is not None and plain[0].trial.lpips is None
    assert made[0].trial is not None and made[0].trial.lpips == {
        name: float(largest(twins[name][None], twins["base"][None])[0]) for name in STRATEGY_NAMES
    }


def test_a_trial_s_probe_is_the_one_that_a_run_takes(
    run_config: Callable[..., RunConfig], make_request: Callable[..., Request], alone: dict[int, Image]
) -> None:
    request = make_request(1)
    engine = build_local_engine(run_config("spread"))
    engine.submit([request])
    (image,) = engine.drain()
    assert isinstance(image, Image) and alone[1].trial is not None
    assert alone[1].trial.probes[4] == image.probe


@pytest.fixture(scope="module")
def alone(run_config: Callable[..., RunConfig], make_request: Callable[..., Request]) -> dict[int, Image]:
    """Trials of five requests, each in a batch of its own."""
    _, made = run(run_config("trials", batch_size=1), [make_request(position) for position in range(5)])
    return made


@pytest.mark.parametrize("side", LATENT_SIDES)
def test_a_run_looks_at_a_trial_s_latents_in_any_batch(
    run_config: Callable[..., RunConfig], make_request: Callable[..., Request], alone: dict[int, Image], side: int
) -> None:
    """To the bit: a chance next to the threshold must not depend on the neighbours."""
    requests = [make_request(position) for position in range(5)]
    seen: dict[int, tuple[float, ...]] = {}

    class Looking(SpreadPolicy):
        def decide(self, request: Request, numbers: Sequence[float]) -> Decision:
            seen[request.position] = tuple(numbers)
            return super().decide(request, numbers)

    engine = build_local_engine(run_config("spread", batch_size=3))
    engine.policy = Looking(name="looking", content_hash="", decision_scale=6, probe=LatentProbe(side))
    engine.submit(requests)
    assert all(isinstance(image, Image) and image.probe is None for image in engine.drain())
    trials = {position: image.trial for position, image in alone.items()}
    assert seen == {position: LatentProbe(side).pick(trial.latents) for position, trial in trials.items() if trial}


def test_too_little_memory_halves_the_batch_and_loses_no_trial(
    run_config: Callable[..., RunConfig], make_request: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [make_request(position, negative_prompt=None, cfg=(3.0,) * 10) for position in range(4)]
    _, plain = run(run_config("trials", batch_size=4), requests)
    engine = build_local_engine(run_config("trials", batch_size=4))
    run_suffixes = engine._runner.run_suffixes

    def lacking(batch, strategies):
        found = run_suffixes(batch, strategies)
        if len(batch.images) > 2:
            raise torch.OutOfMemoryError("no memory for more than two")
        return found

    monkeypatch.setattr(engine._runner, "run_suffixes", lacking)
    engine.submit(requests)
    made = {item.request.position: item for item in engine.drain() if isinstance(item, Image)}
    assert engine.statistics.out_of_memory == 1
    for position, image in plain.items():
        assert image.trial is not None and made[position].trial is not None
        assert image.trial.ssim == made[position].trial.ssim
        assert np.array_equal(image.pixels, made[position].pixels)


def test_a_trial_without_numbers_is_a_failure(
    run_config: Callable[..., RunConfig], make_request: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_local_engine(run_config("trials", batch_size=2))
    run_suffixes = engine._runner.run_suffixes

    def broken(batch, strategies):
        found = run_suffixes(batch, strategies)
        return found | {"uncond_2": replace(found["uncond_2"], is_finite=[False, True])}

    monkeypatch.setattr(engine._runner, "run_suffixes", broken)
    engine.submit([make_request(position, cfg=(3.0,) * 10) for position in (1, 2)])
    kinds = sorted((type(item).__name__, item.key[0] if isinstance(item, Failure) else 2) for item in engine.drain())
    assert kinds == [("Failure", 1), ("Image", 2)]


def test_a_trial_without_numbers_in_a_batch_that_lacks_memory_ends_once(
    run_config: Callable[..., RunConfig], make_request: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_local_engine(run_config("trials", batch_size=2))
    decode, calls = engine._runner.decode_sums, [0]

    def broken(sums):
        calls[0] += 1
        if calls[0] == 2:
            raise torch.OutOfMemoryError("after the first was found to be no numbers")
        pixels, is_finite = decode(sums)
        return pixels, [calls[0] > 1] * len(is_finite)

    monkeypatch.setattr(engine._runner, "decode_sums", broken)
    engine.submit([make_request(position, negative_prompt=None, cfg=(3.0,) * 10) for position in range(2)])
    done = engine.drain()
    assert sorted((one.request if isinstance(one, Image) else one).key for one in done) == [(0, 0), (1, 0)]
