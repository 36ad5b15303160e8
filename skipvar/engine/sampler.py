"""One image, or a batch of them, through the scales: embed, run, guide, sample, add (FORWARD.md sections 2 to 6).

The batched engine and the slow twin `generate_one` share these functions; what differs is who shares a batch.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from skipvar.errors import RowError
from skipvar.model.bsq import add_code, bits_to_code, next_input
from skipvar.model.kv_cache import KeyValueCache
from skipvar.model.pipeline import Pipeline, to_uint8
from skipvar.model.schedules import Schedule
from skipvar.model.transformer import Guidance, TextState
from skipvar.skip.strategy import Mode, Strategy, make_strategy, num_scales_run
from skipvar.types import Image, Probe, Request


@dataclass(frozen=True)
class SamplingRules:
    """What holds for every image of a run."""

    size: str | None = None
    guidance_layers: tuple[int, ...] = (0,)
    """0: guidance on the logits; -j: after block depth-j (FORWARD.md section 8)."""

    def guidance_blocks(self, depth: int) -> list[int]:
        return sorted(depth + layer for layer in self.guidance_layers if layer < 0)


@dataclass
class ImageState:
    """An image on its way: all that it needs to go on in any batch, but for keys and values."""

    request: Request
    schedule: Schedule
    generator: torch.Generator
    text: tuple[TextState, ...] = ()
    """Of one row each: conditional, then unconditional where the image is guided. Empty before `encode_text`."""
    code_sum: Tensor | None = None
    """`(dv, h, w)` float32; None before the first scale."""
    is_finite: bool = True
    """False once a logit was not a number: the image is worthless."""
    slot: int | None = None
    probe: Probe | None = None
    strategy: Strategy | None = None
    scores: Mapping[str, float] | None = None
    seconds: float = 0.0

    @property
    def is_guided(self) -> bool:
        return any(cfg != 1 for cfg in self.request.cfg)

    def token_forwards(self) -> tuple[int, int]:
        """Tokens that go through the transformer, both branches counted: under its strategy, and under `base`."""
        assert self.strategy is not None
        tokens, base = self.schedule.num_tokens, make_strategy("base", self.schedule.num_scales)
        run, full = (strategy.token_forwards(tokens, guided=self.is_guided) for strategy in (self.strategy, base))
        return run, full


def new_image(pipeline: Pipeline, request: Request, rules: SamplingRules) -> ImageState:
    """An image that has not started: its schedule and its stream, no text yet.

    Raises `RowError` for a ratio that the model lacks, and for cfg or tau of another number of scales.
    """
    schedule = pipeline.schedule(request.aspect_ratio, rules.size)
    if {len(request.cfg), len(request.tau)} != {schedule.num_scales}:
        raise RowError(
            f"cfg has {len(request.cfg)} values and tau {len(request.tau)}: both need one for each of the "
            f"{schedule.num_scales} scales"
        )
    return ImageState(request=request, schedule=schedule, generator=torch.Generator().manual_seed(request.seed))


def encode_text(pipeline: Pipeline, image: ImageState) -> None:
    """Fills in an image's text, once."""
    if image.text:
        return
    request = image.request
    features = pipeline.text_encoder.encode(request.prompt)
    has_negative = request.negative_prompt is not None and image.is_guided
    negative = pipeline.text_encoder.encode(request.negative_prompt or "") if has_negative else None
    image.text = encode_branches(pipeline, features, negative, is_guided=image.is_guided)


def start_image(pipeline: Pipeline, request: Request, rules: SamplingRules) -> ImageState:
    """An image that is ready for its first scale: `new_image`, then `encode_text`."""
    image = new_image(pipeline, request, rules)
    encode_text(pipeline, image)
    return image


@torch.inference_mode()
def encode_branches(
    pipeline: Pipeline, features: Tensor, negative: Tensor | None, *, is_guided: bool
) -> tuple[TextState, ...]:
    """Text states of one image from features `(tokens, text_width)`; the unconditional one is as long as the prompt."""
    transformer = pipeline.transformer
    rows = [features]
    if is_guided:
        rows.append(transformer.unconditional_text[: len(features)] if negative is None else negative)
    return tuple(transformer.encode_text(row[None].to(pipeline.device), [len(row)]) for row in rows)


@dataclass
class WorkingBatch:
    """Images of one schedule at one scale, with the cache's rows in their order."""

    images: Sequence[ImageState]
    size: int
    """Rows of images that run: more than `images` where shapes are fixed; the surplus repeats the first image."""
    text: TextState
    cache: KeyValueCache
    code_sum: Tensor
    """`(size, dv, h, w)` float32."""
    is_finite: Tensor
    """`(size,)` bool."""
    is_guided: bool
    scale: int
    """The next scale to run."""
    use_mask: bool
    history: dict[int, Tensor] = field(default_factory=dict)
    """Running code sums kept for the probe, by scale."""

    @classmethod
    def begin(
        cls,
        pipeline: Pipeline,
        images: Sequence[ImageState],
        cache: KeyValueCache,
        *,
        scale: int = 0,
        is_guided: bool | None = None,
        size: int | None = None,
        use_mask: bool = False,
    ) -> "WorkingBatch":
        """A batch of images that all stand before `scale`; the cache must already hold their rows if that is not 0."""
        first, size = images[0], size or len(images)
        members = [*images, *([first] * (size - len(images)))]
        is_guided = first.is_guided if is_guided is None else is_guided
        if scale == 0:
            shape = (size, pipeline.config.vae.latent_channels, *pipeline.latent_grid(first.schedule))
            code_sum = torch.zeros(shape, dtype=torch.float32, device=pipeline.device)
        else:
            code_sum = torch.stack([image.code_sum for image in members if image.code_sum is not None])
        branches = [[image.text[branch] for image in members] for branch in range(1 + is_guided)]
        return cls(
            images=images,
            size=size,
            text=TextState.stack([state for branch in branches for state in branch], use_mask=use_mask),
            cache=cache,
            code_sum=code_sum,
            is_finite=torch.tensor([image.is_finite for image in members], device=pipeline.device),
            is_guided=is_guided,
            scale=scale,
            use_mask=use_mask,
        )

    def drop_unconditional(self) -> None:
        """Ends guidance for good: tokens, caches and text of the unconditional rows go."""
        self.is_guided = False
        self.text = self.text.first_rows(self.size, use_mask=self.use_mask)
        self.cache.keep_rows(self.size)

    def per_image(self, values: Sequence[float]) -> Tensor:
        """One number an image, as `(size, 1, 1)` float32 on the device."""
        padded = [*values, *([values[0]] * (self.size - len(values)))]
        return torch.tensor(padded, dtype=torch.float32, device=self.code_sum.device)[:, None, None]

    def settle(self) -> None:
        """Writes the batch's results back to its images. Reads `is_finite`: one wait for the device."""
        for index, is_finite in enumerate(self.is_finite[: len(self.images)].tolist()):
            self.images[index].code_sum = self.code_sum[index].clone()
            self.images[index].is_finite = is_finite


@dataclass(frozen=True)
class Step:
    """What one scale gave."""

    scale: int
    logits: Tensor
    """`(size, L, 2d)` float32 as the sampler sees them: over tau, guided, before top-k and top-p."""
    bits: Tensor
    """`(size, L, d)` bool."""


@torch.inference_mode()
def run_scales(
    pipeline: Pipeline,
    rules: SamplingRules,
    batch: WorkingBatch,
    modes: Sequence[Mode],
    *,
    keep_last: bool = False,
    keep_sums: Sequence[int] = (),
    forced_bits: Mapping[int, Tensor] | None = None,
) -> Iterator[Step]:
    """Runs a batch from its scale on, in these modes (of all K scales), up to their end or the first skipped one.

    The last scale that runs is not written to the cache unless `keep_last`: more scales follow elsewhere. `keep_sums`
    names scales whose running sum is kept in `batch.history`. `forced_bits[scale]: (size, L, d)` replace the sampled
    bits (which are drawn all the same).
    """
    num_run = num_scales_run(modes)
    for scale in range(batch.scale, num_run):
        if modes[scale] is Mode.CONDITIONAL and batch.is_guided:
            batch.drop_unconditional()
        logits = _logits(pipeline, rules, batch, scale, write=keep_last or scale < num_run - 1)
        bits = sample_bits(logits, draw_thresholds(batch, logits.shape[1], logits.shape[2] // 2))
        if forced_bits and scale in forced_bits:
            bits = forced_bits[scale]
        _add_bits(pipeline, batch, scale, bits)
        if scale in keep_sums:
            batch.history[scale] = batch.code_sum
        batch.is_finite = batch.is_finite & torch.isfinite(logits).flatten(1).all(dim=1)
        batch.scale = scale + 1
        yield Step(scale, logits, bits)


def _logits(pipeline: Pipeline, rules: SamplingRules, batch: WorkingBatch, scale: int, *, write: bool) -> Tensor:
    """Logits `(size, L, 2d)` of a scale, over tau and guided."""
    transformer = pipeline.transformer
    schedule = batch.images[0].schedule
    if scale == 0:
        x = transformer.embed_start(batch.text)
    else:
        is_patchified = pipeline.config.transformer.spatial_patchify
        x = transformer.embed_tokens(next_input(batch.code_sum, schedule.grids[scale], is_patchified), scale)
        x = x.repeat(2, 1, 1) if batch.is_guided else x
    cos, sin = pipeline.rope(schedule)
    tokens = slice(schedule.first_token(scale), schedule.first_token(scale + 1))
    strengths = [image.request.cfg[scale] for image in batch.images]
    guidance = Guidance(batch.per_image(strengths), batch.per_image([1 - cfg for cfg in strengths]))
    blocks = rules.guidance_blocks(transformer.config.depth) if batch.is_guided else []
    mixed_at = dict.fromkeys(blocks, guidance)
    x = transformer(x, batch.text, (cos[tokens], sin[tokens]), batch.cache, write=write, guidance_after_block=mixed_at)
    is_mixed = batch.is_guided and 0 in rules.guidance_layers and any(cfg != 1 for cfg in strengths)
    inverse_tau = batch.per_image([1 / image.request.tau[scale] for image in batch.images])
    if is_mixed:
        return guidance.mix(transformer.logits(x, batch.text) * inverse_tau.repeat(2, 1, 1))
    return transformer.logits(x[: batch.size], batch.text) * inverse_tau


def _add_bits(pipeline: Pipeline, batch: WorkingBatch, scale: int, bits: Tensor) -> None:
    """Adds a scale's codes to the running sum."""
    schedule = batch.images[0].schedule
    code = bits_to_code(bits, schedule.grids[scale], pipeline.config.transformer.spatial_patchify)
    batch.code_sum = add_code(batch.code_sum, code, is_last=scale == schedule.num_scales - 1)


def draw_thresholds(batch: WorkingBatch, num_tokens: int, num_bits: int) -> Tensor:
    """Each image's next thresholds `(size, L, d)`, drawn on the CPU from its own stream."""
    own = [
        bit_thresholds(image.generator, (num_tokens, num_bits), image.request.top_k, image.request.top_p)
        for image in batch.images
    ]
    thresholds = torch.stack([*own, *([own[0]] * (batch.size - len(own)))])
    return thresholds.to(batch.code_sum.device, non_blocking=True)


def bit_thresholds(generator: torch.Generator, shape: tuple[int, int], top_k: int, top_p: float) -> Tensor:
    """How far the logit of 1 must be above that of 0 for a bit to be 1: `shape` float32 (FORWARD.md section 5).

    Choosing the larger of `p / e`, with one exponential draw `e` for each value, is `l1 - l0 > log(e1 / e0)`; top-p
    drops the less likely value at `|l1 - l0| >= log(top_p / (1 - top_p))`, so the threshold never leaves that range;
    top-k of 1 leaves the arg max. The stream is used up in any case.
    """
    draws = torch.empty(*shape, 2).exponential_(1, generator=generator)
    if top_k == 1:
        return torch.zeros(shape)
    threshold = (draws[..., 1] / draws[..., 0]).log()
    if top_p == 0 or top_p == 1:
        return threshold
    limit = max(0.0, math.log(top_p / (1 - top_p)))
    return threshold.clamp(-limit, limit)


def sample_bits(logits: Tensor, thresholds: Tensor) -> Tensor:
    """Bits `(B, L, d)` bool from logits `(B, L, 2d)`: adjacent pairs hold the logits of 0 and of 1."""
    pairs = logits.unflatten(-1, (-1, 2))
    return pairs[..., 1] - pairs[..., 0] > thresholds


@torch.inference_mode()
def sample_bits_by_multinomial(logits: Tensor, generator: torch.Generator, top_k: int, top_p: float) -> Tensor:
    """The slow twin of thresholds for one image: filter, softmax and draw as upstream does, `(L, 2d)` -> `(L, d)`."""
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


@torch.inference_mode()
def generate_one(
    pipeline: Pipeline, request: Request, strategy: str = "base", rules: SamplingRules | None = None
) -> Image:
    """One image by itself, no probe, no grouping: the slow, obvious twin of the engine."""
    start, rules = time.perf_counter(), rules or SamplingRules()
    image = start_image(pipeline, request, rules)
    image.strategy = make_strategy(strategy, image.schedule.num_scales)
    config = pipeline.config.transformer
    cache = KeyValueCache(
        depth=config.depth,
        num_heads=config.num_heads,
        head_width=config.head_width,
        capacity=2 * image.schedule.first_token(image.schedule.num_scales),
        dtype=pipeline.dtype,
        device=pipeline.device,
    )
    cache.begin(1 + image.is_guided, image.schedule.first_token(image.schedule.num_scales))
    batch = WorkingBatch.begin(pipeline, [image], cache)
    for _ in run_scales(pipeline, rules, batch, image.strategy.modes):
        pass
    batch.settle()
    pixels = to_uint8(pipeline.decode(batch.code_sum)).cpu().numpy()[0]
    image.seconds = time.perf_counter() - start
    return finished_image(image, pixels)


def finished_image(image: ImageState, pixels: np.ndarray) -> Image:
    """The result of an image whose scales have all run; `pixels: (H, W, 3)` uint8."""
    assert image.strategy is not None
    run, base = image.token_forwards()
    return Image(
        request=image.request,
        pixels=pixels,
        strategy=image.strategy.name,
        probe=image.probe,
        strategy_scores=image.scores,
        scales_run=image.strategy.num_scales_run,
        cost_share=run / base,
        engine_seconds=image.seconds,
    )
