"""A batch of images through the scales: embed, run, guide, sample, add (FORWARD.md sections 2 to 6).

The batched engine and the slow twin share this; what differs is who shares a batch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skipvar.engine.state import ImageState
from skipvar.errors import RowError
from skipvar.model.attention import TextPadding
from skipvar.model.bsq import add_code, bits_to_code, next_input
from skipvar.model.kv_cache import KeyValueCache
from skipvar.model.pipeline import Pipeline
from skipvar.model.transformer import Guidance, TextState
from skipvar.skip.strategy import Mode, num_scales_run
from skipvar.types import Request


@dataclass(frozen=True)
class SamplingRules:
    """What holds for every image of a run."""

    size: str | None = None
    guidance_layers: tuple[int, ...] = (0,)
    """0: guidance on the logits; -j: after block depth-j (FORWARD.md section 8)."""


@dataclass(frozen=True)
class BatchMark:
    """Where a working batch stood. Tensors are shared, not copied: nothing changes them in place."""

    code_sum: Tensor
    is_finite: Tensor
    scale: int
    cached_tokens: int
    random_states: tuple[Tensor, ...]
    """State of each image's generator."""


@dataclass
class WorkingBatch:
    """Images of one schedule at one scale, with the cache's rows in their order. `Sampler.begin` makes it."""

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
    history: dict[int, Tensor] = field(default_factory=dict)
    """Running code sums kept for the probe, by scale."""

    def drop_unconditional(self) -> None:
        """Ends guidance for good: tokens, caches and text of the unconditional rows go."""
        self.is_guided = False
        self.text = self.text.first_rows(self.size)
        self.cache.keep_rows(self.size)

    def mark(self) -> BatchMark:
        """What `rewind` needs to bring the batch back here."""
        random_states = tuple(image.generator.get_state() for image in self.images)
        return BatchMark(self.code_sum, self.is_finite, self.scale, self.cache.length, random_states)

    def rewind(self, mark: BatchMark) -> None:
        """Goes back to a mark of this batch; unconditional rows that were dropped since then stay dropped."""
        self.code_sum, self.is_finite, self.scale = mark.code_sum, mark.is_finite, mark.scale
        self.cache.rewind(mark.cached_tokens)
        for image, state in zip(self.images, mark.random_states, strict=True):
            image.generator.set_state(state)

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


class Sampler:
    """A model and what holds for every image of a run: starts images and takes batches of them from scale to scale."""

    def __init__(
        self,
        pipeline: Pipeline,
        rules: SamplingRules | None = None,
        *,
        text_padding: TextPadding = TextPadding.NONE,
    ) -> None:
        self.pipeline, self.rules, self.text_padding = pipeline, rules or SamplingRules(), text_padding

    @property
    def fixed_shapes(self) -> bool:
        """Whether no shape may depend on who shares a batch."""
        return self.text_padding is TextPadding.FULL

    # ---- images ----

    def new_image(self, request: Request) -> ImageState:
        """An image that has not started: its schedule and its stream, no text yet.

        Raises `RowError` for a ratio that the model lacks, and for cfg or tau of another number of scales.
        """
        schedule = self.pipeline.schedule(request.aspect_ratio, self.rules.size)
        if {len(request.cfg), len(request.tau)} != {schedule.num_scales}:
            raise RowError(
                f"cfg has {len(request.cfg)} values and tau {len(request.tau)}: both need one for each of the "
                f"{schedule.num_scales} scales"
            )
        return ImageState(request=request, schedule=schedule, generator=torch.Generator().manual_seed(request.seed))

    @torch.inference_mode()
    def encode_text(self, image: ImageState) -> None:
        """Fills in an image's text, once: each row by itself, so that no padding is needed.

        The learned unconditional text is cut to the prompt's length.
        """
        if image.text:
            return
        encoder, transformer, request = self.pipeline.text_encoder, self.pipeline.transformer, image.request
        rows = [encoder.encode(request.prompt)]
        if image.is_guided and request.negative_prompt is not None:
            rows.append(encoder.encode(request.negative_prompt))
        elif image.is_guided:
            rows.append(transformer.unconditional_text[: len(rows[0])])
        image.text = tuple(transformer.encode_text(row[None].to(self.pipeline.device), [len(row)]) for row in rows)

    def start_image(self, request: Request) -> ImageState:
        """An image that is ready for its first scale: `new_image`, then `encode_text`."""
        image = self.new_image(request)
        self.encode_text(image)
        return image

    # ---- batches ----

    def new_cache(self, num_tokens: int) -> KeyValueCache:
        """Memory for keys and values of so many tokens over all rows of a batch."""
        config = self.pipeline.config.transformer
        return KeyValueCache(
            depth=config.depth,
            num_heads=config.num_heads,
            head_width=config.head_width,
            capacity=num_tokens,
            dtype=self.pipeline.dtype,
            device=self.pipeline.device,
        )

    def begin(
        self,
        images: Sequence[ImageState],
        cache: KeyValueCache,
        *,
        scale: int = 0,
        is_guided: bool | None = None,
        size: int | None = None,
    ) -> WorkingBatch:
        """A batch of images that all stand before `scale`; the cache must already hold their rows if that is not 0."""
        first, size, device = images[0], size or len(images), self.pipeline.device
        members = [*images, *([first] * (size - len(images)))]
        is_guided = first.is_guided if is_guided is None else is_guided
        if scale == 0:
            shape = (size, self.pipeline.config.vae.latent_channels, *self.pipeline.latent_grid(first.schedule))
            code_sum = torch.zeros(shape, dtype=torch.float32, device=device)
        else:
            code_sum = torch.stack([image.code_sum for image in members if image.code_sum is not None])
        rows = [image.text[branch] for branch in range(1 + is_guided) for image in members]
        max_tokens = self.pipeline.config.transformer.text_max_tokens
        return WorkingBatch(
            images=images,
            size=size,
            text=TextState.stack(rows, self.text_padding, max_tokens),
            cache=cache,
            code_sum=code_sum,
            is_finite=torch.tensor([image.is_finite for image in members], device=device),
            is_guided=is_guided,
            scale=scale,
        )

    def run(
        self,
        batch: WorkingBatch,
        modes: Sequence[Mode],
        *,
        keep_last: bool = False,
        keep_sums: Sequence[int] = (),
        forced_bits: Mapping[int, Tensor] | None = None,
    ) -> Iterator[Step]:
        """Takes a batch from its scale on, in these modes (of all K scales), to their end or the first skipped one.

        The last scale that runs is not written to the cache unless `keep_last`: more scales follow elsewhere.
        `keep_sums` names scales whose running sum is kept in `batch.history`. `forced_bits[scale]: (size, L, d)`
        replace the sampled bits (which are drawn all the same).
        """
        num_run, forced_bits = num_scales_run(modes), forced_bits or {}
        for scale in range(batch.scale, num_run):
            write = keep_last or scale < num_run - 1
            step = self.step(batch, modes[scale], write=write, forced_bits=forced_bits.get(scale))
            if scale in keep_sums:
                batch.history[scale] = batch.code_sum
            yield step

    @torch.inference_mode()
    def step(self, batch: WorkingBatch, mode: Mode, *, write: bool, forced_bits: Tensor | None = None) -> Step:
        """Runs the batch's next scale; `write` keeps its keys and values for the scales that follow."""
        scale = batch.scale
        if mode is Mode.CONDITIONAL and batch.is_guided:
            batch.drop_unconditional()
        logits = self._logits(batch, scale, write=write)
        bits = sample_bits(logits, draw_thresholds(batch, logits.shape[1], logits.shape[2] // 2))
        if forced_bits is not None:
            bits = forced_bits
        self._add_bits(batch, scale, bits)
        batch.is_finite = batch.is_finite & torch.isfinite(logits).flatten(1).all(dim=1)
        batch.scale = scale + 1
        return Step(scale, logits, bits)

    def _logits(self, batch: WorkingBatch, scale: int, *, write: bool) -> Tensor:
        """Logits `(size, L, 2d)` of a scale, over tau and guided."""
        pipeline, transformer = self.pipeline, self.pipeline.transformer
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
        blocks = [transformer.config.depth + layer for layer in self.rules.guidance_layers if layer < 0]
        mixed_at = dict.fromkeys(blocks, guidance) if batch.is_guided else {}
        rope = (cos[tokens], sin[tokens])
        x = transformer(x, batch.text, rope, batch.cache, write=write, guidance_after_block=mixed_at)
        inverse_tau = batch.per_image([1 / image.request.tau[scale] for image in batch.images])
        is_mixed = self.fixed_shapes or any(cfg != 1 for cfg in strengths)
        if batch.is_guided and 0 in self.rules.guidance_layers and is_mixed:
            return guidance.mix(transformer.logits(x, batch.text) * inverse_tau.repeat(2, 1, 1))
        return transformer.logits(x[: batch.size], batch.text) * inverse_tau

    def _add_bits(self, batch: WorkingBatch, scale: int, bits: Tensor) -> None:
        """Adds a scale's codes to the running sum."""
        schedule = batch.images[0].schedule
        code = bits_to_code(bits, schedule.grids[scale], self.pipeline.config.transformer.spatial_patchify)
        batch.code_sum = add_code(batch.code_sum, code, is_last=scale == schedule.num_scales - 1)


def draw_thresholds(batch: WorkingBatch, num_tokens: int, num_bits: int) -> Tensor:
    """Each image's next thresholds `(size, L, d)`, drawn on the CPU from its own stream."""
    drawn = [
        bit_thresholds(image.generator, (num_tokens, num_bits), image.request.top_k, image.request.top_p)
        for image in batch.images
    ]
    thresholds = torch.stack([*drawn, *([drawn[0]] * (batch.size - len(drawn)))])
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
