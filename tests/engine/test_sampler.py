"""Sampling: thresholds are upstream's draws, every image has its own stream, and batches change nothing."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from skipvar.engine.sampler import Sampler, WorkingBatch, bit_thresholds, sample_bits
from skipvar.engine.twin import generate_one
from skipvar.errors import RowError
from skipvar.model.kv_cache import KeyValueCache
from skipvar.model.pipeline import Pipeline, to_uint8
from skipvar.skip.strategy import STRATEGY_NAMES, Mode, make_strategy
from skipvar.types import Request

MakeRequest = Callable[..., Request]
NUM_SCALES, NUM_TOKENS = 10, 680


@pytest.fixture(scope="module")
def pipeline(small_pipeline: Pipeline) -> Pipeline:
    return small_pipeline


@torch.inference_mode()
def sample_bits_by_multinomial(logits: Tensor, generator: torch.Generator, top_k: int, top_p: float) -> Tensor:
    """The twin of thresholds for one image: filter, softmax and draw as upstream does, `(L, 2d)` -> `(L, d)`."""
    pairs = logits.unflatten(-1, (-1, 2))
    if top_k == 1:
        pairs = pairs.masked_fill(pairs < pairs.amax(dim=-1, keepdim=True), -torch.inf)
    if top_p > 0:
        ordered, order = pairs.sort(dim=-1)
        dropped = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        dropped[..., -1] = False
        pairs = pairs.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    draws = torch.multinomial(pairs.softmax(dim=-1).reshape(-1, 2), 1, replacement=True, generator=generator)
    return draws.reshape(pairs.shape[:-1]).bool()


def new_cache(pipeline: Pipeline, rows: int) -> KeyValueCache:
    cache = Sampler(pipeline).new_cache(rows * NUM_TOKENS)
    cache.begin(rows, NUM_TOKENS)
    return cache


def new_batch(pipeline: Pipeline, requests: Sequence[Request], size: int | None = None) -> WorkingBatch:
    sampler = Sampler(pipeline)
    images = [sampler.start_image(request) for request in requests]
    cache = new_cache(pipeline, (size or len(images)) * (1 + images[0].is_guided))
    return sampler.begin(images, cache, size=size)


def run_all(pipeline: Pipeline, batch: WorkingBatch, strategy: str = "base", **options: object) -> list[Tensor]:
    modes = make_strategy(strategy, NUM_SCALES).modes
    return [step.bits for step in Sampler(pipeline).run(batch, modes, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("top_k", [0, 1, 2, 900])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.5, 0.9, 0.97, 1.0])
def test_thresholds_are_the_multinomial_draw(top_k: int, top_p: float) -> None:
    """The same bits as filter, softmax and `torch.multinomial`, and the same stream afterwards."""
    for seed in range(3):
        logits = 4 * torch.randn(300, 64, generator=torch.Generator().manual_seed(seed))
        first, second = (torch.Generator().manual_seed(seed) for _ in range(2))
        bits = sample_bits(logits, bit_thresholds(first, (300, 32), top_k, top_p))
        assert torch.equal(bits, sample_bits_by_multinomial(logits, second, top_k, top_p))
        assert torch.equal(first.get_state(), second.get_state())


def test_top_p_bounds_the_thresholds() -> None:
    thresholds = bit_thresholds(torch.Generator().manual_seed(0), (100, 100), 900, 0.97)
    assert thresholds.abs().max().item() == pytest.approx(math.log(0.97 / 0.03))
    assert thresholds.abs().median() < 1.5


def test_a_stream_that_is_cut_is_the_start_of_the_longer_one() -> None:
    first, second = (torch.Generator().manual_seed(3) for _ in range(2))
    parts = [bit_thresholds(first, shape, 900, 0.97) for shape in ((1, 8), (4, 8), (9, 8))]
    again = [bit_thresholds(second, shape, 900, 0.97) for shape in ((1, 8), (4, 8))]
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=False))


@pytest.mark.parametrize("strategy", ["base", "uncond_2"])
def test_a_mixed_batch_gives_what_each_image_gives_alone(
    strategy: str, pipeline: Pipeline, make_request: MakeRequest
) -> None:
    """Mixed guidance, temperature, top-k and top-p, negative prompts and text lengths, bit for bit."""
    requests = [
        make_request(0),
        make_request(1, tau=tuple(np.linspace(0.4, 1.2, NUM_SCALES)), top_k=1, cfg=(7.5,) * NUM_SCALES),
        make_request(3, top_p=0.0, negative_prompt="a long negative prompt with many words in it"),
        make_request(4, cfg=(1.0, *(2.0,) * (NUM_SCALES - 1))),
    ]
    batch = new_batch(pipeline, requests)
    run_all(pipeline, batch, strategy)
    pixels = to_uint8(pipeline.decode(batch.code_sum)).numpy()
    for index, request in enumerate(requests):
        assert np.array_equal(pixels[index], generate_one(pipeline, request, strategy).pixels), f"image {index}"


def test_unguided_images_have_one_branch(pipeline: Pipeline, make_request: MakeRequest) -> None:
    requests = [make_request(position, cfg=(1.0,) * NUM_SCALES) for position in (1, 2)]
    batch = new_batch(pipeline, requests)
    assert not batch.is_guided and batch.cache.num_rows == 2 and len(batch.images[0].text) == 1
    run_all(pipeline, batch)
    base = generate_one(pipeline, requests[0])
    assert np.array_equal(to_uint8(pipeline.decode(batch.code_sum)).numpy()[0], base.pixels)
    uncond = generate_one(pipeline, requests[0], "uncond_3")
    assert np.array_equal(uncond.pixels, base.pixels) and uncond.cost_share == 1


def test_surplus_rows_change_nothing(pipeline: Pipeline, make_request: MakeRequest) -> None:
    requests = [make_request(1), make_request(2)]
    exact, padded = new_batch(pipeline, requests), new_batch(pipeline, requests, size=5)
    bits, more = run_all(pipeline, exact), run_all(pipeline, padded)
    assert all(torch.equal(a, b[:2]) and len(b) == 5 for a, b in zip(bits, more, strict=True))
    padded.settle()
    assert len(padded.images) == 2 and torch.equal(padded.images[1].code_sum, exact.code_sum[1])  # type: ignore[arg-type]


def test_another_seed_gives_another_image(pipeline: Pipeline, make_request: MakeRequest) -> None:
    first, second = (generate_one(pipeline, make_request(1, seed=seed)) for seed in (5, 6))
    assert not np.array_equal(first.pixels, second.pixels)
    assert np.array_equal(first.pixels, generate_one(pipeline, make_request(1, seed=5)).pixels)


def test_forced_bits_reproduce_another_seeds_run(pipeline: Pipeline, make_request: MakeRequest) -> None:
    other = new_batch(pipeline, [make_request(1, seed=8)])
    forced = dict(enumerate(run_all(pipeline, other)))
    batch = new_batch(pipeline, [make_request(1, seed=9)])
    bits = run_all(pipeline, batch, forced_bits=forced)
    assert all(torch.equal(bits[scale], forced[scale]) for scale in forced)
    assert torch.equal(batch.code_sum, other.code_sum)
    # The stream was used up all the same: both generators stand where a run of this length ends.
    free = new_batch(pipeline, [make_request(1, seed=9)])
    run_all(pipeline, free)
    assert torch.equal(batch.images[0].generator.get_state(), free.images[0].generator.get_state())


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
def test_strategies_run_what_they_say(strategy: str, pipeline: Pipeline, make_request: MakeRequest) -> None:
    modes = make_strategy(strategy, NUM_SCALES).modes
    base, batch = new_batch(pipeline, [make_request(2)]), new_batch(pipeline, [make_request(2)])
    full, bits = run_all(pipeline, base, keep_sums=range(NUM_SCALES)), run_all(pipeline, batch, strategy)
    num_run = sum(mode is not Mode.SKIPPED for mode in modes)
    num_guided = sum(mode is Mode.GUIDED for mode in modes)
    assert len(bits) == num_run
    assert all(torch.equal(a, b) for a, b in zip(full[:num_guided], bits, strict=False))
    if num_run == num_guided:
        assert torch.equal(batch.code_sum, base.history[num_run - 1])
    assert batch.is_guided == (Mode.CONDITIONAL not in modes)
    assert batch.cache.num_rows == 1 + batch.is_guided and len(batch.text.layout.lengths) == 1 + batch.is_guided


def test_the_last_scale_that_runs_is_not_written(pipeline: Pipeline, make_request: MakeRequest) -> None:
    batch = new_batch(pipeline, [make_request(1)])
    run_all(pipeline, batch, "skip_2")
    schedule = batch.images[0].schedule
    assert batch.cache.length == schedule.first_token(NUM_SCALES - 3)
    kept = new_batch(pipeline, [make_request(1)])
    run_all(pipeline, kept, "skip_2", keep_last=True)
    assert kept.cache.length == schedule.first_token(NUM_SCALES - 2)
    assert torch.equal(kept.code_sum, batch.code_sum)


@pytest.mark.parametrize("strategy", ["base", "skip_1", "uncond_3"])
def test_a_run_in_two_parts_is_the_run_in_one(strategy: str, pipeline: Pipeline, make_request: MakeRequest) -> None:
    """A prefix of two images, then each image's suffix by itself."""
    requests, prefix = [make_request(1), make_request(2)], make_strategy("skip_3", NUM_SCALES).modes
    batch = new_batch(pipeline, requests)
    for _ in Sampler(pipeline).run(batch, prefix, keep_last=True):
        pass
    batch.settle()
    modes = make_strategy(strategy, NUM_SCALES).modes
    for index, image in enumerate(batch.images):
        cache, held = new_cache(pipeline, 2), batch.cache.length
        for branch in range(2):
            cache.keys[:, branch, :, :held] = batch.cache.keys[:, index + 2 * branch, :, :held]
            cache.values[:, branch, :, :held] = batch.cache.values[:, index + 2 * branch, :, :held]
        cache.length = held
        suffix = Sampler(pipeline).begin([image], cache, scale=NUM_SCALES - 3)
        assert len(list(Sampler(pipeline).run(suffix, modes))) == 3 - modes.count(Mode.SKIPPED)
        expected = generate_one(pipeline, requests[index], strategy)
        assert np.array_equal(to_uint8(pipeline.decode(suffix.code_sum)).numpy()[0], expected.pixels)


def test_cost_share(pipeline: Pipeline, make_request: MakeRequest) -> None:
    image = generate_one(pipeline, make_request(1), "skip_1")
    assert image.scales_run == NUM_SCALES - 1
    assert image.cost_share == pytest.approx((NUM_TOKENS - 256) / NUM_TOKENS)
    assert image.pixels.shape == (128, 128, 3) and image.pixels.dtype == np.uint8


def test_numbers_that_are_none_mark_the_image_alone(pipeline: Pipeline, make_request: MakeRequest) -> None:
    sampler = Sampler(pipeline)
    images = [sampler.start_image(make_request(position)) for position in (1, 2)]
    spoiled = replace(images[1].text[0], keys_values=images[1].text[0].keys_values * math.nan)
    images[1].text = (spoiled, images[1].text[1])
    batch = sampler.begin(images, new_cache(pipeline, 4))
    run_all(pipeline, batch, "skip_3")
    batch.settle()
    assert [image.is_finite for image in images] == [True, False]


def test_rows_that_cannot_be_made(pipeline: Pipeline, make_request: MakeRequest) -> None:
    with pytest.raises(RowError, match="aspect_ratio 2"):
        Sampler(pipeline).start_image(make_request(1, aspect_ratio=2.0))
    with pytest.raises(RowError, match="cfg has 3 values"):
        Sampler(pipeline).start_image(make_request(1, cfg=(3.0,) * 3))
