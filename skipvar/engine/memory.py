"""From memory to batch sizes: what an image costs before, between and after its decision. No torch.

Batches are budgeted by tokens: beyond some thousand rows a step gains nothing from more images, but every image that a
batch must wait for costs a slot. The budget gives sizes that depend on the model alone, so all replicas have the same;
the pool has room for every bucket to be one image short of full with one more prefix batch on top, so that a batch
never runs part full for lack of room. Where that does not fit, smaller batches do.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from skipvar.errors import ConfigError, ModelError
from skipvar.model.config import ModelConfig, VaeConfig
from skipvar.model.schedules import Schedule
from skipvar.skip.strategy import Mode, Strategy, make_strategy

BRANCHES = 2
"""Rows of a guided image. Room is made for both: any row of the input may ask for guidance."""
MAX_ROWS = {"cuda": 17_000, "cpu": 4_250}
"""Rows (tokens over all images and branches) of a batch's largest step, by device."""
MAX_IMAGES = {"cuda": 64, "cpu": 8}
DECODE_PIXELS = 2_200_000
"""Pixels that are decoded together: two images of 1024 x 1024."""
RESERVE_BYTES = 512 * 2**20
"""For what is not counted: workspaces of matrix products, the text encoder's one text, small tensors."""
RESERVE_SHARE = 0.05
"""Of what is free, for holes between blocks of memory."""
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Costs:
    """Bytes and tokens of one image of a model at one size: the worst of its aspect ratios."""

    model: ModelConfig
    schedules: tuple[Schedule, ...]
    element_bytes: int
    """Of a key, a value or an activation in the model's dtype."""
    decision_scale: int | None
    """None where every image's strategy is known before it starts, and none waits."""
    strategy_names: Sequence[str]
    """Those that may occur: one, where it is known before an image starts."""

    @cached_property
    def strategies(self) -> tuple[Strategy, ...]:
        return tuple(make_strategy(name, self.schedules[0].num_scales) for name in self.strategy_names)

    @property
    def prefix_scales(self) -> int:
        """Scales up to and with the decision scale; 0 without a decision."""
        return 0 if self.decision_scale is None else self.decision_scale + 1

    @property
    def waits(self) -> bool:
        """Whether images wait in buckets at all."""
        return self.prefix_scales > 0

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, of a scale or of a text."""
        return 2 * self.model.transformer.depth * self.model.transformer.width * self.element_bytes

    @property
    def prefix_tokens(self) -> int:
        """Tokens of a row that are held while an image waits in a bucket."""
        return max(schedule.first_token(self.prefix_scales) for schedule in self.schedules)

    @property
    def waiting_bytes(self) -> int:
        """Of the slot of an image that waits."""
        return BRANCHES * self.prefix_tokens * self.bytes_per_token

    @property
    def text_bytes(self) -> int:
        """Of an image's text: keys and values of both branches, each as long as a text can be."""
        return BRANCHES * self.model.transformer.text_max_tokens * self.bytes_per_token

    @property
    def image_pixels(self) -> int:
        return self._latent_cells * self.model.vae.patch_size**2

    @property
    def _latent_cells(self) -> int:
        side = 2 if self.model.transformer.spatial_patchify else 1
        return max(schedule.num_tokens[-1] for schedule in self.schedules) * side**2

    @property
    def sum_bytes(self) -> int:
        """Of a running code sum."""
        return self._latent_cells * self.model.vae.latent_channels * FLOAT32_BYTES

    @property
    def decode_bytes(self) -> int:
        """Working memory of decoding one image."""
        return decoder_bytes(self.model.vae, self.image_pixels, self.element_bytes)

    def has_suffix(self, strategy: Strategy) -> bool:
        """Whether a scale is left to run after the decision."""
        return strategy.num_scales_run > self.prefix_scales

    def cached_tokens(self, strategy: Strategy) -> int:
        """Tokens over an image's rows that the working cache has room for: the last scale that runs is not written.

        A batch's rows are cut once, so the unconditional ones take room up to its last scale, unless guidance has ended
        before it starts: the suffix of an image that waited, conditional from its first scale on.
        """
        last = strategy.num_scales_run - 1
        tokens = max(schedule.first_token(last) for schedule in self.schedules)
        starts_conditional = self.waits and strategy.modes[self.prefix_scales] is Mode.CONDITIONAL
        return max((1 if starts_conditional else BRANCHES) * tokens, BRANCHES * self.prefix_tokens)

    def prefix_rows(self) -> int:
        """Rows of one image in the largest step of its prefix."""
        return BRANCHES * max(schedule.num_tokens[self.prefix_scales - 1] for schedule in self.schedules)

    def suffix_rows(self, strategy: Strategy) -> int:
        """Rows of one image in the largest step after the decision (of all steps where it does not wait)."""
        return max((rows for rows, _ in self._suffix_steps(strategy)), default=0)

    def prefix_bytes(self) -> int:
        """Working memory of one image in its prefix, beside the cache."""
        return self._step_bytes(self.prefix_rows()) + self._batch_bytes

    def suffix_bytes(self, strategy: Strategy) -> int:
        """Working memory of one image in the largest step of its suffix, beside the cache."""
        steps = [self._step_bytes(rows, unwritten) for rows, unwritten in self._suffix_steps(strategy)]
        return max(steps, default=0) + self._batch_bytes

    @property
    def _batch_bytes(self) -> int:
        """What a batch holds of each image: a copy of its text and a few running sums."""
        return self.text_bytes + 8 * self.sum_bytes

    def _suffix_steps(self, strategy: Strategy) -> Iterator[tuple[int, int]]:
        """Of each step: its rows, and over all rows the tokens that are copied for attention (those of all scales, in
        the last step, which is not written to the cache)."""
        last = strategy.num_scales_run - 1
        for schedule in self.schedules:
            for scale in range(self.prefix_scales, last + 1):
                branches = BRANCHES if strategy.modes[scale] is Mode.GUIDED else 1
                copied = branches * schedule.first_token(scale + 1) if scale == last else 0
                yield branches * schedule.num_tokens[scale], copied

    def _step_bytes(self, rows: int, copied_tokens: int = 0) -> int:
        """Tensors that are alive at once in a block (model/blocks.py), at its three peaks; of the head there are fewer.

        Everywhere the residual stream and its normalised copy, in float32. Turning the keys: queries, keys and values
        as they were projected, turned queries, and the keys four times in float32. Attending: nine tensors in the
        model's dtype, and the copied keys and values. In the MLP: its hidden activations before and after GELU. A test
        holds these counts against the tensors of a step of the real size.
        """
        transformer, element = self.model.transformer, self.element_bytes
        stream = 2 * FLOAT32_BYTES * transformer.width
        turning = stream + (4 * element + 4 * FLOAT32_BYTES) * transformer.width
        attending = stream + 9 * element * transformer.width
        mlp = stream + 2 * element * transformer.mlp_width
        copied = 2 * element * transformer.width * copied_tokens
        logits = 8 * FLOAT32_BYTES * transformer.bits_per_token
        return max(rows * max(turning, mlp), rows * attending + copied) + rows * logits


def decoder_bytes(vae: VaeConfig, pixels: int, element_bytes: int) -> int:
    """Working memory of the decoder (model/vae.py) for so many pixels.

    The widest moments are a level's first residual block, which still has the width of the level before, and the
    convolution after nearest x2. A convolution may copy what it reads and writes into another layout.
    """
    widths = [vae.base_width * multiplier for multiplier in vae.width_multipliers]
    top, peaks = len(widths) - 1, []
    for level, width in enumerate(widths):
        before, cells = widths[min(level + 1, top)], pixels // 4**level
        first = before + max(2 * before, before + width, 3 * width) + before + width
        later = before + 4 * width + 2 * width
        upsample = before + width + 4 * (2 * width + 2 * width) if level > 0 else 0
        peaks.append(cells * max(first, later, upsample))
    return max(peaks) * element_bytes + pixels * 12 * FLOAT32_BYTES


@dataclass(frozen=True)
class BatchSizes:
    """Images in a batch, at most: of a prefix, of each strategy's suffix, and of what is decoded together."""

    prefix_images: int
    suffix_images: Mapping[str, int]
    decode_images: int


@dataclass(frozen=True)
class MemoryPlan(BatchSizes):
    """Batch sizes that fit, and what is set aside for them."""

    pool_images: int
    """Slots of images that wait."""
    cache_tokens: int
    """Capacity of the working cache: tokens over all rows of the largest batch."""
    planned_bytes: int
    """All that is promised, reserves included."""


def batch_sizes(costs: Costs, *, device: str, batch_size: int | None = None) -> BatchSizes:
    """The sizes that the token budget gives, or a given `batch_size` for every kind of batch; memory may lower them.

    They depend on the model, the size, the policy's strategies and the kind of device (cpu or cuda) alone: under
    `engine.fixed_shapes` they are the sizes of all replicas, and part of the fingerprint.
    """
    return next(_falling_sizes(costs, device, batch_size))


def _falling_sizes(costs: Costs, device: str, batch_size: int | None) -> Iterator[BatchSizes]:
    """Smaller and smaller sizes, down to one image in every batch."""
    decode = max(1, min(MAX_IMAGES[device], DECODE_PIXELS // costs.image_pixels))
    if batch_size is not None:
        for size in range(batch_size, 0, -1):
            yield BatchSizes(size, {strategy.name: size for strategy in costs.strategies}, min(decode, size))
        return
    rows = {strategy.name: costs.suffix_rows(strategy) for strategy in costs.strategies}
    prefix_rows = costs.prefix_rows() if costs.waits else max(rows.values())
    last: BatchSizes | None = None
    for max_rows in range(MAX_ROWS[device], -1, -250):
        # A strategy without a suffix has no batches of its own: its size is the prefix's.
        fitting = [max_rows // (count or prefix_rows) for count in (prefix_rows, *rows.values())]
        prefix, *suffixes = (max(1, min(MAX_IMAGES[device], count)) for count in fitting)
        sizes = BatchSizes(prefix, dict(zip(rows, suffixes, strict=True)), decode)
        if sizes != last:
            yield sizes
        last = sizes


def plan_memory(
    costs: Costs,
    *,
    device: str,
    batch_size: int | None,
    pool_images: int | None,
    free_bytes: int | None,
    fixed_shapes: bool = False,
) -> MemoryPlan:
    """The largest batch sizes, up to those of `batch_sizes`, that fit in `free_bytes` of device memory.

    `free_bytes` None: nothing is lowered (a CPU). A given `pool_images` is taken where there is room for it. Raises
    `ModelError` where not even single images fit, and `ConfigError` where sizes may not be lowered (`fixed_shapes`).
    """
    plan: MemoryPlan | None = None
    for sizes in _falling_sizes(costs, device, batch_size):
        plan = _plan(costs, sizes, pool_images, free_bytes, fixed_shapes=fixed_shapes)
        if free_bytes is None or plan.planned_bytes <= free_bytes:
            return plan
        if fixed_shapes:
            raise ConfigError(
                f"engine.fixed_shapes: the batches of {costs.model.name} need {_gigabytes(plan.planned_bytes)} of "
                f"device memory beside the weights, {_gigabytes(free_bytes)} are free; give a smaller engine.batch_size"
            )
    assert plan is not None and free_bytes is not None
    raise ModelError(
        f"{costs.model.name} at size {costs.schedules[0].size} needs {_gigabytes(plan.planned_bytes)} of device memory "
        f"beside its weights for one image at a time, and {_gigabytes(free_bytes)} are free: use a smaller "
        "sampling.size, or a device with more memory"
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _plan(
    costs: Costs, sizes: BatchSizes, pool_images: int | None, free_bytes: int | None, *, fixed_shapes: bool
) -> MemoryPlan:
    """The memory that batches of these sizes take, with the pool that they need (or as much of it as fits)."""
    suffixes = [strategy for strategy in costs.strategies if costs.has_suffix(strategy)]
    held = [sizes.suffix_images[strategy.name] * costs.cached_tokens(strategy) for strategy in suffixes]
    cache_tokens = max(1, *held, sizes.prefix_images * BRANCHES * costs.prefix_tokens)
    working = [sizes.suffix_images[strategy.name] * costs.suffix_bytes(strategy) for strategy in suffixes]
    if costs.waits:
        working.append(sizes.prefix_images * costs.prefix_bytes())
    rope_bytes = sum(schedule.first_token(schedule.num_scales) for schedule in costs.schedules)
    rope_bytes *= costs.model.transformer.head_width * FLOAT32_BYTES
    fixed = cache_tokens * costs.bytes_per_token + rope_bytes + RESERVE_BYTES + int(RESERVE_SHARE * (free_bytes or 0))
    image_bytes = costs.waiting_bytes + costs.text_bytes + costs.sum_bytes

    needed = sizes.prefix_images
    if costs.waits:
        needed += sum(sizes.suffix_images[strategy.name] - 1 for strategy in suffixes)
    pool, decode_images = pool_images or needed, sizes.decode_images
    if free_bytes is not None:
        if pool_images is not None:
            pool = min(pool_images, (free_bytes - fixed - max(*working, costs.decode_bytes)) // image_bytes)
        if not fixed_shapes:
            left = free_bytes - fixed - max(pool, needed) * image_bytes
            decode_images = max(1, min(decode_images, left // costs.decode_bytes))
    pool = max(pool, sizes.prefix_images)
    planned = fixed + pool * image_bytes + max(*working, decode_images * costs.decode_bytes)
    return MemoryPlan(sizes.prefix_images, sizes.suffix_images, decode_images, pool, cache_tokens, planned)
