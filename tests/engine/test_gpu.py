"""On a real GPU: the pictures of a CPU, the same in any batch, memory used as planned, and what comes when it lacks."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

import skipvar.engine.build
from skipvar.config import EngineConfig, ModelSection, RunConfig
from skipvar.engine.engine import Engine
from skipvar.engine.memory import plan_memory
from skipvar.engine.resolved import resolve
from skipvar.engine.twin import generate_one
from skipvar.local import build_local_engine
from skipvar.model.pipeline import load_pipeline
from skipvar.types import Failure, Image, Request

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MakeRequest = Callable[..., Request]
EMOJI = ModelSection(name="emoji", device="cuda", dtype="bfloat16")
PROMPTS = (
    "a large red apple on a blue background",
    "four pandas on pink stripes",
    "nine small keys on a dotted black background",
    "a rocket on white confetti",
)


def requests(make_request: MakeRequest, count: int) -> list[Request]:
    return [make_request(position, prompt=PROMPTS[position % len(PROMPTS)]) for position in range(count)]


def run(engine: Engine, given: Sequence[Request]) -> dict[int, Image]:
    """All images by position; every request comes back once, as an image, and every slot is free again."""
    engine.submit(given)
    finished = engine.drain()
    assert not [item.message for item in finished if isinstance(item, Failure)]
    images = {item.request.position: item for item in finished if isinstance(item, Image)}
    assert sorted(images) == sorted(request.position for request in given) and len(finished) == len(given)
    assert len(engine._runner._free_slots) == engine._runner.plan.pool_images
    return images


def mean_distance(one: Image, other: Image) -> float:
    """Mean absolute difference of two images' pixels, of 255."""
    return float(np.abs(one.pixels.astype(float) - other.pixels.astype(float)).mean())


def test_float32_pictures_are_those_of_a_cpu(make_request: MakeRequest) -> None:
    """But for a bit here and there whose draw lay on its threshold."""
    section = replace(EMOJI, dtype="float32")
    on_cpu = load_pipeline(replace(section, device="cpu"))
    given = requests(make_request, 12)
    images = run(build_local_engine(RunConfig(model=section, policy="spread")), given)
    distances = [
        mean_distance(generate_one(on_cpu, request, images[request.position].strategy), images[request.position])
        for request in given
    ]
    print("mean distance from the CPU's:", [round(distance, 2) for distance in distances])
    assert np.median(distances) < 0.5 and max(distances) < 12


def test_the_engine_makes_what_its_twin_does(make_request: MakeRequest) -> None:
    """In bfloat16, where batches of other sizes round otherwise: alike, not the same."""
    engine = build_local_engine(RunConfig(model=EMOJI, policy="spread"))
    images = run(engine, requests(make_request, 24))
    distances = [
        mean_distance(generate_one(engine.pipeline, image.request, image.strategy), image) for image in images.values()
    ]
    print("mean distance from the twin's:", [round(distance, 2) for distance in distances])
    assert np.median(distances) < 6


def test_fixed_shapes_give_the_same_pixels_in_any_batch(make_request: MakeRequest) -> None:
    given = requests(make_request, 30)
    config = RunConfig(model=EMOJI, policy="spread", engine=EngineConfig(fixed_shapes=True, batch_size=8))
    expected = run(build_local_engine(config), given)
    engine, others = build_local_engine(config), random.Random(0).sample(given, len(given))
    again = run(engine, others[:7]) | run(engine, others[7:])
    assert all(np.array_equal(again[position].pixels, image.pixels) for position, image in expected.items())


def test_out_of_memory_is_survived(make_request: MakeRequest) -> None:
    engine = build_local_engine(RunConfig(model=EMOJI, policy="spread"))
    given = requests(make_request, 200)
    run(engine, given[:1])
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 60 * 2**20) / total)
    try:
        run(engine, given)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    print("out of memory:", engine.statistics.out_of_memory, engine.statistics.to_dict())
    assert engine.statistics.out_of_memory > 0


@pytest.mark.parametrize("name", ["infinity_125m", "infinity_2b"])
def test_memory_is_used_as_planned(
    name: str, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the real sizes, at 1024 x 1024, with seeded random weights: batches run full, and within their plan."""
    config = RunConfig(model=ModelSection(name=name, path="random:0", device="cuda"), policy="spread")
    resolved = resolve(config)
    pipeline = load_pipeline(replace(config.model, device=resolved.device, dtype=resolved.dtype))
    monkeypatch.setattr(skipvar.engine.build, "load_pipeline", lambda section: pipeline)
    weights, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    plan = plan_memory(resolved.costs, device="cuda", batch_size=None, pool_images=None, free_bytes=free)
    engine = build_local_engine(config, resolved)
    sampling = {"cfg": (4.0,) * resolved.num_scales, "tau": (1.0,) * resolved.num_scales}
    given = [make_request(position, negative_prompt=None, **sampling) for position in range(plan.pool_images)]
    torch.cuda.reset_peak_memory_stats()
    run(engine, given)
    used = torch.cuda.max_memory_allocated() - weights
    with capsys.disabled():
        print(f"\n{name}: {used / 1e9:.2f} GB used of {plan.planned_bytes / 1e9:.2f} GB planned, {plan}")
        print({key: round(value, 2) for key, value in engine.statistics.seconds.items()})
    assert engine.statistics.out_of_memory == 0
    assert 0.5 * plan.planned_bytes < used <= plan.planned_bytes
