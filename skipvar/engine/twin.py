"""The slow, obvious twins of the engine: one image by itself, and bits drawn as upstream draws them."""

import time

import torch
from torch import Tensor

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
