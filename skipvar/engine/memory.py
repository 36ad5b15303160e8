"""From memory to batch sizes: what an image costs before, between and after its decision. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from skipvar.model.config import ModelConfig
from skipvar.model.schedules import Schedule
from skipvar.skip.strategy import STRATEGY_NAMES, Mode, Strategy, make_strategy

BRANCHES = 2
"""Rows of a guided image. Room is made for both: any row of the input may ask for guidance."""
DEFAULT_CPU_BATCH = 8
"""Larger batches gain nothing on one core."""
MAX_AUTO_BATCH = 64
DECODE_TENSORS = 6
"""Feature maps of the VAE's widest level that are alive at once while it decodes, counted generously."""
ACTIVATION_TENSORS = 24
"""Activations of the residual stream's size in float32 that are alive at once in a block, counted generously."""


@dataclass(frozen=True)
class Costs:
    """Bytes and tokens of one image of a model at one size: the worst of its aspect ratios."""

    schedules: tuple[Schedule, ...]
    strategies: tuple[Strategy, ...]
    """Those that may occur: one, where it is known before an image starts."""
    prefix_scales: int
    """Scales up to the decision; 0 where every image's strategy is known before it starts, and none waits."""
    bytes_per_token: int
    """Keys and values of one token in all layers."""
    width: int
    decode_bytes: int
    """Working memory of decoding one image."""

    @property
    def prefix_tokens(self) -> int:
        """Tokens of a row that are held while an image waits in a bucket."""
        return max(schedule.first_token(self.prefix_scales) for schedule in self.schedules)

    @property
    def waits(self) -> bool:
        """Whether images wait in buckets at all."""
        return self.prefix_scales > 0

    def cached_tokens(self, strategy: Strategy) -> int:
        """Tokens over an image's rows that the working cache has room for: the last scale that runs is not written.

        A batch's rows are cut once, so the unconditional ones take room up to its last scale, unless guidance has ended
        before it starts: the suffix of an image that waited, conditional from its first scale on.
        """
        last = strategy.num_scales_run - 1
        tokens = max(schedule.first_token(last) for schedule in self.schedules)
        starts_conditional = self.waits and strategy.modes[self.prefix_scales] is Mode.CONDITIONAL
        return max((1 if starts_conditional else BRANCHES) * tokens, BRANCHES * self.prefix_tokens)

    def step_bytes(self, strategy: Strategy) -> int:
        """Working memory of one image in its largest step: cache and activations."""
        last = strategy.num_scales_run - 1
        largest = max(schedule.num_tokens[last] for schedule in self.schedules)
        activations = BRANCHES * largest * self.width * 4 * ACTIVATION_TENSORS
        return self.cached_tokens(strategy) * self.bytes_per_token + activations

    @property
    def waiting_bytes(self) -> int:
        return BRANCHES * self.prefix_tokens * self.bytes_per_token


@dataclass(frozen=True)
class MemoryPlan:
    """Batch sizes that fit."""

    prefix_images: int
    suffix_images: Mapping[str, int]
    pool_images: int
    decode_images: int
    cache_tokens: int
    """Capacity of the working cache: tokens over all rows of the largest batch."""


def image_costs(
    config: ModelConfig,
    schedules: tuple[Schedule, ...],
    element_bytes: int,
    *,
    decision_scale: int | None,
    known_strategy: str | None,
) -> Costs:
    """What one image costs, from the model's sizes alone; `known_strategy` where a policy names it from the start."""
    num_scales = schedules[0].num_scales
    names = [known_strategy] if known_strategy is not None else STRATEGY_NAMES
    transformer = config.transformer
    factor = config.vae.patch_size * (2 if transformer.spatial_patchify else 1)
    pixels = max(schedule.num_tokens[-1] for schedule in schedules) * factor**2
    return Costs(
        schedules=schedules,
        strategies=tuple(make_strategy(name, num_scales) for name in names),
        prefix_scales=0 if known_strategy is not None or decision_scale is None else decision_scale + 1,
        bytes_per_token=2 * transformer.depth * transformer.width * element_bytes,
        width=transformer.width,
        decode_bytes=pixels * config.vae.base_width * config.vae.width_multipliers[0] * element_bytes * DECODE_TENSORS,
    )


def plan_memory(
    costs: Costs,
    *,
    batch_size: int | None,
    pool_images: int | None,
    free_bytes: int | None,
) -> MemoryPlan:
    """Batch sizes for `free_bytes` of device memory (None: a CPU, whose batches are small anyway).

    Given sizes are taken as they are.
    """
    waits = costs.waits
    strategies = costs.strategies
    if batch_size is not None or free_bytes is None:
        size = batch_size or DEFAULT_CPU_BATCH
        suffix_images = {strategy.name: size for strategy in strategies}
        prefix_images = size
    else:
        working_bytes = free_bytes // 2 if waits else free_bytes * 9 // 10
        suffix_images = {
            strategy.name: max(1, min(MAX_AUTO_BATCH, working_bytes // costs.step_bytes(strategy)))
            for strategy in strategies
        }
        prefix_images = min(
            max(suffix_images.values()), _pool_that_fits(costs, free_bytes) if waits else MAX_AUTO_BATCH
        )
    if not waits:
        pool = prefix_images  # no slots are taken
    elif pool_images is not None:
        pool = max(pool_images, prefix_images)
    elif free_bytes is None:
        pool = len(strategies) * (prefix_images - 1) + 2 * prefix_images
    else:
        pool = max(prefix_images, min(_pool_that_fits(costs, free_bytes), len(strategies) * MAX_AUTO_BATCH))
    held = [suffix_images[strategy.name] * costs.cached_tokens(strategy) for strategy in strategies]
    return MemoryPlan(
        prefix_images=prefix_images,
        suffix_images=suffix_images,
        pool_images=pool,
        decode_images=prefix_images if free_bytes is None else max(1, free_bytes // 10 // costs.decode_bytes),
        cache_tokens=max(1, *held, prefix_images * BRANCHES * costs.prefix_tokens),
    )


def _pool_that_fits(costs: Costs, free_bytes: int) -> int:
    return max(1, free_bytes * 2 // 5 // max(1, costs.waiting_bytes))
