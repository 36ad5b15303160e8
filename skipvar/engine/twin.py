"""The slow, obvious twin of the engine: one image by itself."""

import time

import torch

from skipvar.engine.sampler import Sampler, SamplingRules
from skipvar.model.pipeline import Pipeline, to_uint8
from skipvar.skip.strategy import make_strategy
from skipvar.types import Image, Request


@torch.inference_mode()
def generate_one(
    pipeline: Pipeline, request: Request, strategy: str = "base", rules: SamplingRules | None = None
) -> Image:
    """One image by itself: no probe, no grouping."""
    start, sampler = time.perf_counter(), Sampler(pipeline, rules)
    image = sampler.start_image(request)
    image.strategy = make_strategy(strategy, image.schedule.num_scales)
    num_tokens = image.schedule.first_token(image.schedule.num_scales)
    cache = sampler.new_cache(2 * num_tokens)
    cache.begin(1 + image.is_guided, num_tokens)
    batch = sampler.begin([image], cache)
    for _ in sampler.run(batch, image.strategy.modes):
        pass
    batch.settle()
    pixels = to_uint8(pipeline.decode(batch.code_sum)).cpu().numpy()[0]
    image.seconds["twin"] = time.perf_counter() - start
    return image.finish(pixels)
