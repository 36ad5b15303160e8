"""Out of memory, wherever it comes: images go back to the state that they had, no slot leaks, nobody is lost."""

import random
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from skipvar.engine.engine import Engine
from skipvar.errors import ModelError
from skipvar.model.text_encoder import RandomTextEncoder
from skipvar.types import Failure, Image, Request

MakeRequest = Callable[..., Request]
NewEngine = Callable[..., Engine]
NUM_IMAGES = 16


@pytest.fixture(scope="module")
def requests(make_request: MakeRequest) -> list[Request]:
    return [make_request(position) for position in range(NUM_IMAGES)]


@pytest.fixture
def undisturbed(new_engine: NewEngine, requests: list[Request], cache: dict[int, Image] = {}) -> dict[int, Image]:  # noqa: B006
    if not cache:
        engine = new_engine()
        engine.submit(requests)
        cache |= {image.request.position: image for image in engine.drain() if isinstance(image, Image)}
    return cache


def failing(function: Callable[..., Any], fails: Callable[[], bool], *, afterwards: bool = False) -> Callable[..., Any]:
    """The function, out of memory where `fails` says so: before it did anything, or when all is done."""

    def run(*args: Any, **options: Any) -> Any:
        if not afterwards and fails():
            raise torch.OutOfMemoryError("injected")
        result = function(*args, **options)
        if afterwards and fails():
            raise torch.OutOfMemoryError("injected")
        return result

    return run


def places(engine: Engine) -> dict[str, tuple[Any, str]]:
    """Where memory is asked for: an owner and the name of its method."""
    runner, pipeline = engine._runner, engine.pipeline
    return {
        "text": (pipeline.text_encoder, "encode"),
        "scale": (pipeline.transformer, "forward"),
        "hold": (runner._slots, "store"),
        "load": (runner._slots, "load"),
        "probe and decode": (pipeline.decoder, "forward"),
        "decode": (runner, "decode"),
        "prefix": (runner, "run_prefix"),
        "suffix": (runner, "run_suffix"),
        "probe": (runner, "probe"),
    }


def run(engine: Engine, requests: Sequence[Request]) -> list[Image | Failure]:
    """Runs to the end; every request comes back exactly once and every slot is free again."""
    engine.submit(requests)
    finished = engine.drain()
    keys = Counter(item.key if isinstance(item, Failure) else item.request.key for item in finished)
    assert keys == Counter(request.key for request in requests)
    assert len(engine._runner._free_slots) == engine._runner.plan.pool_images and engine.num_pending == 0
    return finished


def assert_same(finished: Sequence[Image | Failure], undisturbed: dict[int, Image]) -> None:
    for image in finished:
        if isinstance(image, Image):
            expected = undisturbed[image.request.position]
            assert (image.strategy, image.probe) == (expected.strategy, expected.probe)
            assert np.array_equal(image.pixels, expected.pixels), image.request.position


@pytest.mark.parametrize("afterwards", [False, True])
@pytest.mark.parametrize(
    "place", ["text", "scale", "hold", "load", "probe and decode", "decode", "prefix", "suffix", "probe"]
)
def test_twice_in_one_place(
    place: str,
    afterwards: bool,
    undisturbed: dict[int, Image],
    new_engine: NewEngine,
    requests: list[Request],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = new_engine()
    owner, name = places(engine)[place]
    calls = iter(range(10**6))
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), lambda: next(calls) < 2, afterwards=afterwards))
    finished = run(engine, requests)
    num_failed = sum(isinstance(item, Failure) for item in finished)
    assert_same(finished, undisturbed)
    assert num_failed <= 1, "only an image that was alone may fail"
    assert engine.statistics.out_of_memory == 2
    assert engine.statistics.images == NUM_IMAGES - num_failed and engine.statistics.prefix.images == NUM_IMAGES


@pytest.mark.parametrize("seed", range(4))
def test_at_random_moments(
    seed: int,
    undisturbed: dict[int, Image],
    new_engine: NewEngine,
    requests: list[Request],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only an image that was alone may fail, and says why."""
    engine, chance = new_engine(), random.Random(seed)
    for owner, name in places(engine).values():
        for afterwards in (False, True):
            broken = failing(getattr(owner, name), lambda: chance.random() < 0.01, afterwards=afterwards)
            monkeypatch.setattr(owner, name, broken)
    finished = run(engine, requests)
    assert_same(finished, undisturbed)
    failures = [item for item in finished if isinstance(item, Failure)]
    assert all("not enough device memory for one image" in failure.message for failure in failures)
    assert len(failures) < NUM_IMAGES // 2 and engine.statistics.out_of_memory > 0


def test_a_failed_hold_costs_no_slots(new_engine: NewEngine, requests: list[Request]) -> None:
    """Two batches that could not be moved to their slots used to use up all of them."""
    engine = new_engine(pool=6)
    calls = iter(range(10**6))
    engine._runner._slots.store = failing(engine._runner._slots.store, lambda: next(calls) < 3)  # type: ignore[method-assign]
    run(engine, requests)


def test_memory_is_given_back_after_the_tensors_are_let_go(
    new_engine: NewEngine, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine()
    held: list[weakref.ref[torch.Tensor]] = []

    def encode(*_: Any) -> Any:
        if not held:
            activations = torch.ones(3)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("injected")
        return original(engine.pipeline.text_encoder, requests[0].prompt)

    original = RandomTextEncoder.encode
    monkeypatch.setattr(engine.pipeline.text_encoder, "encode", encode)
    found: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append(held[0]() is None))
    run(engine, requests[:6])
    assert found == [True]


def test_the_limit_is_halved_and_remembered(new_engine: NewEngine, requests: list[Request]) -> None:
    engine = new_engine("fixed:skip_3")
    sizes: list[int] = []

    def run_whole(images: Sequence[Any], *_: Any) -> None:
        sizes.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("injected")
        original(images, *_)

    original = engine._runner.run_whole
    engine._runner.run_whole = run_whole  # type: ignore[method-assign]
    run(engine, [request for request in requests if any(cfg != 1 for cfg in request.cfg)][:9])
    assert sizes == [6, 3, 3, 3]


def test_a_part_full_batch_comes_back_smaller(new_engine: NewEngine, requests: list[Request]) -> None:
    engine = new_engine("fixed:skip_3", batch_size=8)
    calls = iter(range(10**6))
    engine._runner.run_whole = failing(engine._runner.run_whole, lambda: next(calls) < 1)  # type: ignore[method-assign]
    run(engine, requests[:3])
    assert engine.statistics.whole["skip_3"].batches == 2


@pytest.mark.parametrize("place", ["scale", "hold", "load", "decode"])
def test_fixed_shapes_end_the_run(
    place: str, new_engine: NewEngine, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch sizes are part of the fingerprint there; a padded batch of one image is no smaller than a full one."""
    engine = new_engine(batch_size=3, fixed_shapes=True)
    owner, name = places(engine)[place]
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), lambda: True))
    engine.submit(requests[:1])
    with pytest.raises(ModelError, match=r"engine\.fixed_shapes"):
        engine.drain()
