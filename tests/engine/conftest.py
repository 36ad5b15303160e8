"""What the engine's tests share: a small model."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from skipvar.engine.batcher import Limits
from skipvar.engine.engine import Engine
from skipvar.engine.memory import Costs, plan_memory
from skipvar.engine.resolved import DeviceReport
from skipvar.engine.runner import Runner
from skipvar.engine.sampler import Sampler
from skipvar.engine.self_check import make_batch_invariant
from skipvar.model.attention import TextPadding
from skipvar.model.pipeline import Pipeline
from skipvar.model.presets import EMOJI, PRESETS
from skipvar.model.text_encoder import RandomTextEncoder
from skipvar.model.transformer import Transformer
from skipvar.model.vae import Decoder
from skipvar.skip.policy_file import ModelFacts, load_policy

NewEngine = Callable[..., Engine]

SMALL = replace(
    EMOJI,
    transformer=replace(EMOJI.transformer, depth=2, width=64, num_heads=2),
    vae=replace(EMOJI.vae, width_multipliers=(1, 2, 2, 2)),
)


@pytest.fixture(scope="session")
def small_pipeline() -> Pipeline:
    """A smaller emoji model with seeded random weights."""
    sizes = SMALL.transformer
    transformer = Transformer(sizes)
    transformer.init_weights(0)
    device = torch.device("cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = Decoder(SMALL.vae)
    pipeline = Pipeline(
        config=SMALL,
        transformer=transformer.eval().requires_grad_(False),
        decoder=decoder.eval().requires_grad_(False),
        text_encoder=RandomTextEncoder(text_width=sizes.text_width, max_tokens=64, seed=0, device=device),
        dtype=torch.float32,
        device=device,
        weights_sha256={},
    )
    assert make_batch_invariant(pipeline, pipeline.schedule(1.0, None), 5).is_invariant
    return pipeline


@pytest.fixture(scope="module")
def small_emoji() -> Iterator[None]:
    """The preset `emoji` is a smaller model meanwhile: for tests that make many images and ask for no real width."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "emoji", SMALL)
        yield


@pytest.fixture
def new_engine(small_pipeline: Pipeline) -> NewEngine:
    """Engines on a small model, as `build_engine` makes them."""

    def make(policy: str = "spread", batch_size: int = 6, pool: int = 40, *, fixed_shapes: bool = False) -> Engine:
        pipeline = replace(
            small_pipeline,
            transformer=copy.copy(small_pipeline.transformer),
            decoder=copy.copy(small_pipeline.decoder),
            text_encoder=copy.copy(small_pipeline.text_encoder),
        )
        schedule = pipeline.schedule(1.0, None)
        chosen = load_policy(policy, ModelFacts("emoji", schedule.num_scales, {}))
        decision_scale = None if chosen.known_strategy else chosen.decision_scale
        costs = Costs(pipeline.config, (schedule,), 4, decision_scale, chosen.strategies)
        plan = plan_memory(costs, device="cpu", batch_size=batch_size, pool_images=pool, free_bytes=None)
        sampler = Sampler(pipeline, text_padding=TextPadding.FULL if fixed_shapes else TextPadding.NONE)
        runner = Runner(sampler, plan, slot_tokens=costs.prefix_tokens)
        limits = Limits(plan.prefix_images, plan.suffix_images, plan.pool_images)
        report = DeviceReport(processor="", torch="", batch_size={}, pool_images=plan.pool_images, self_check=None)
        return Engine(runner, chosen, limits, report)

    return make
