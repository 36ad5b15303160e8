"""Plain generation for training's own sheets and scores: one batch, one schedule, nothing skipped.

It calls the networks exactly as the engine does; skipping is read off it for free, since the running sum after scale
`k` is what an image is decoded from whose later scales are skipped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import T5EncoderModel

from skipvar.model.bsq import add_code, bits_to_code, next_input
from skipvar.model.kv_cache import KeyValueCache
from skipvar.model.rope import rope_table
from skipvar.model.transformer import TextState, Transformer
from skipvar.training.recipe import GRIDS, NUM_SCALES, SCHEDULE, EvaluationRecipe
from skipvar.training.text import encode_captions


@dataclass(frozen=True)
class Sampled:
    """A generated batch."""

    sums: list[Tensor]
    """The running code sum `(B, dv, Hf, Wf)` float32 after each scale."""


@torch.no_grad()
def generate(
    transformer: Transformer,
    text_encoder: T5EncoderModel,
    prompts: tuple[Tensor, Sequence[int]],
    settings: EvaluationRecipe,
    seeds: Sequence[int] | None = None,
) -> Sampled:
    """Generates a batch from padded token ids and their lengths; image `i` has its own random stream `seeds[i]`."""
    ids, lengths = prompts
    count = len(ids)
    generators = [torch.Generator().manual_seed(seed) for seed in (seeds or range(count))]
    text = _encode_with_guidance(transformer, text_encoder, ids, lengths)
    config = transformer.config
    cache = KeyValueCache(
        depth=config.depth,
        rows=2 * count,
        num_heads=config.num_heads,
        tokens=SCHEDULE.first_token(NUM_SCALES),
        head_width=config.head_width,
        dtype=torch.float32,
        device=ids.device,
    )
    cache.begin(2 * count)
    cosines, sines = rope_table(SCHEDULE, config.head_width)
    code_sum = torch.zeros(count, config.latent_channels, *GRIDS[-1])
    sums: list[Tensor] = []
    x = transformer.embed_start(text)
    for scale, grid in enumerate(GRIDS):
        tokens = slice(SCHEDULE.first_token(scale), SCHEDULE.first_token(scale + 1))
        out = transformer(x, text, (cosines[tokens], sines[tokens]), cache, write=True)
        conditional, unconditional = (transformer.logits(out, text) / settings.tau).chunk(2)
        logits = settings.cfg * conditional + (1 - settings.cfg) * unconditional
        bits = _draw_bits(logits, settings.top_p, generators)
        code_sum = add_code(code_sum, bits_to_code(bits, grid, False), is_last=scale + 1 == NUM_SCALES)
        sums.append(code_sum)
        if scale + 1 < NUM_SCALES:
            x = transformer.embed_tokens(next_input(code_sum, GRIDS[scale + 1], False), scale + 1).repeat(2, 1, 1)
    return Sampled(sums)


def _encode_with_guidance(
    transformer: Transformer, text_encoder: T5EncoderModel, ids: Tensor, lengths: Sequence[int]
) -> TextState:
    """The prompts' rows, then as many unconditional ones of the same lengths."""
    features = encode_captions(text_encoder, ids, lengths).float()
    table = transformer.unconditional_text[: features.shape[1]].float().expand_as(features)
    return transformer.encode_text(torch.cat([features, table]), [*lengths, *lengths], use_mask=True)


def _draw_bits(logits: Tensor, top_p: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Bool bits `(B, L, d)` from logits `(B, L, 2d)`: the less likely value is dropped if its share is <= 1 - top_p."""
    pairs = logits.unflatten(-1, (-1, 2))
    noise = torch.stack([torch.empty(pairs.shape[1:]).exponential_(1, generator=g) for g in generators])
    shares = pairs.softmax(dim=-1)
    shares = torch.where(shares <= 1 - top_p, 0.0, shares)
    return (shares / noise).argmax(dim=-1).bool()
