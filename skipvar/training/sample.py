"""Plain generation for training's own sheets and scores: one batch, one schedule, nothing skipped.

It calls the networks exactly as the engine does; skipping is read off it for free, since the running sum after scale
`k` is what an image is decoded from whose later scales are skipped.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from skipvar.model.bsq import add_code, bits_to_code, next_input
from skipvar.model.kv_cache import KeyValueCache
from skipvar.model.rope import rope_table
from skipvar.model.transformer import Transformer
from skipvar.training.recipe import GRIDS, NUM_SCALES, SCHEDULE, EvaluationRecipe


@torch.no_grad()
def generate(
    transformer: Transformer,
    features: Tensor,
    lengths: Sequence[int],
    settings: EvaluationRecipe,
    seeds: Sequence[int] | None = None,
) -> list[Tensor]:
    """Generates a batch: the running code sums `(B, dv, Hf, Wf)` float32 after each scale.

    `features (B, T, text_width)` of the text encoder, padded; prompt `i` has `lengths[i]` tokens and its own random
    stream `seeds[i]`.
    """
    count = len(features)
    generators = [torch.Generator().manual_seed(seed) for seed in (seeds or range(count))]
    table = transformer.unconditional_text[: features.shape[1]].float().expand_as(features)
    text = transformer.encode_text(torch.cat([features.float(), table]), [*lengths, *lengths], use_mask=True)
    config = transformer.config
    cache = KeyValueCache(
        depth=config.depth,
        num_heads=config.num_heads,
        head_width=config.head_width,
        capacity=2 * count * SCHEDULE.first_token(NUM_SCALES),
        dtype=transformer.token_embedding.weight.dtype,
        device=features.device,
    )
    cache.begin(2 * count, SCHEDULE.first_token(NUM_SCALES))
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
    return sums


def _draw_bits(logits: Tensor, top_p: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Bool bits `(B, L, d)` from logits `(B, L, 2d)`: the less likely value is dropped if its share is <= 1 - top_p."""
    pairs = logits.unflatten(-1, (-1, 2))
    noise = torch.stack([torch.empty(pairs.shape[1:]).exponential_(1, generator=g) for g in generators])
    shares = pairs.softmax(dim=-1)
    shares = torch.where(shares <= 1 - top_p, 0.0, shares)
    return (shares / noise).argmax(dim=-1).bool()
