"""Checks at start that an image's bits do not depend on its batch, on the shapes that will be run (DESIGN.md)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from skipvar.model.attention import TextLayout, TextPadding
from skipvar.model.linear import set_row_padding
from skipvar.model.pipeline import Pipeline
from skipvar.model.schedules import Schedule

ROW_PADDINGS = (16, 32, 64)
"""Tried in this order: another processor may need another rule."""


@dataclass(frozen=True)
class SelfCheck:
    """What was found."""

    is_invariant: bool
    row_padding: int
    differing_scales: tuple[int, ...]
    """Scales whose shapes gave other bits in another batch, under the last padding tried."""


def make_batch_invariant(pipeline: Pipeline, schedule: Schedule, batch_size: int) -> SelfCheck:
    """Finds the smallest row padding under which this processor gives the same bits in any batch, and leaves it set.

    CPU only; the caller has set one thread. The last padding stays set where none passes. Text and images need no
    check: there the text encoder and the decoder run one image at a time.
    """
    for padding in ROW_PADDINGS:
        set_row_padding(pipeline.transformer, padding)
        scales = range(schedule.num_scales)
        differing = tuple(scale for scale in scales if not _scale_agrees(pipeline, schedule, scale, batch_size))
        if not differing:
            break
    return SelfCheck(is_invariant=not differing, row_padding=padding, differing_scales=differing)


@torch.inference_mode()
def _scale_agrees(pipeline: Pipeline, schedule: Schedule, scale: int, batch_size: int) -> bool:
    """One block, the embedding and the head on random values: a batch with mixed text lengths against its rows."""
    transformer, generator = pipeline.transformer, torch.Generator().manual_seed(scale)
    config, rows = transformer.config, 2 * batch_size
    tokens, held = schedule.num_tokens[scale], schedule.first_token(scale)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    lengths = [min(4 + 3 * (row % batch_size % 3), config.text_max_tokens) for row in range(rows)]
    codes, keys, values = (
        random(rows, tokens, config.bits_per_token),
        *(random(rows, config.num_heads, held, config.head_width, dtype=pipeline.dtype) for _ in range(2)),
    )
    text = random(2, rows, config.num_heads, max(lengths), config.head_width, dtype=pipeline.dtype)
    modulation, head = random(rows, 6, config.width), random(rows, 2, config.width)
    start, stop = schedule.first_token(scale), schedule.first_token(scale + 1)
    rope = tuple(part[start:stop] for part in pipeline.rope(schedule))
    block = transformer.blocks[0]

    def run(part: slice) -> Tensor:
        def extend(new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
            return torch.cat([keys[part], new_keys], dim=2), torch.cat([values[part], new_values], dim=2)

        layout = TextLayout.of(lengths[part], torch.device("cpu"), TextPadding.NONE)
        x = transformer.embed_tokens(codes[part], scale)
        x = block(x, modulation[part], rope, extend, text[:, part], layout)
        return transformer.head_logits(x, head[part])

    together = run(slice(0, rows))
    parts = [slice(row, row + 1) for row in (0, rows - 1)] + [slice(0, 2), slice(0, max(1, rows - 3))]
    return all(torch.equal(together[part], run(part)) for part in parts)
