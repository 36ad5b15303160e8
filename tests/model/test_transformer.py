"""The transformer: all scales at once equal scale after scale, guidance inside the network, other number formats."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from skipvar.model.attention import TextPadding
from skipvar.model.bsq import next_input
from skipvar.model.config import TransformerConfig
from skipvar.model.kv_cache import KeyValueCache
from skipvar.model.rope import rope_table
from skipvar.model.schedules import EMOJI_SCHEDULES, find_schedule
from skipvar.model.transformer import Guidance, TextState, Transformer, block_causal_mask

SIZES = TransformerConfig(
    depth=3,
    width=64,
    num_heads=2,
    mlp_ratio=4,
    text_width=256,
    text_max_tokens=16,
    latent_channels=8,
    spatial_patchify=False,
)
SCHEDULE = find_schedule(EMOJI_SCHEDULES, 1.0, None)
SCALES = range(6)


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    return new_transformer()


def new_transformer() -> Transformer:
    transformer = Transformer(SIZES)
    transformer.init_weights(0)
    return transformer.eval().requires_grad_(False)


def texts(transformer: Transformer, lengths: Sequence[int]) -> TextState:
    generator = torch.Generator().manual_seed(1)
    states = [transformer.encode_text(torch.randn(1, n, 256, generator=generator), [n]) for n in lengths]
    return TextState.stack(states, TextPadding.NONE)


def inputs(batch: int) -> list[Tensor]:
    """Resized code sums `(batch, L, d)` of scales 1, 2, ..."""
    sums = torch.randn(len(SCALES), batch, 8, 16, 16, generator=torch.Generator().manual_seed(2))
    return [next_input(sums[scale], SCHEDULE.grids[scale], False) for scale in SCALES[1:]]


def step_by_step(
    transformer: Transformer, text: TextState, codes: Sequence[Tensor], mixed: Mapping[int, Guidance] | None = None
) -> list[Tensor]:
    """Outputs of the blocks `(n, L, C)`, scale after scale."""
    cos, sin = rope_table(SCHEDULE, SIZES.head_width)
    dtype = transformer.token_embedding.weight.dtype
    cache = KeyValueCache(
        depth=3, num_heads=2, head_width=32, capacity=4000, dtype=dtype, device=torch.device("cpu")
    )  # fmt: skip
    rows, outputs = len(text.layout.lengths), []
    cache.begin(rows, SCHEDULE.first_token(len(SCALES)))
    for scale in SCALES:
        x = transformer.embed_start(text) if scale == 0 else transformer.embed_tokens(codes[scale - 1], scale)
        x = x.repeat(rows // len(x), 1, 1)
        tokens = slice(SCHEDULE.first_token(scale), SCHEDULE.first_token(scale + 1))
        rope, write = (cos[tokens], sin[tokens]), scale < SCALES[-1]
        outputs.append(transformer(x, text, rope, cache, write=write, guidance_after_block=mixed))
    return outputs


def test_all_scales_at_once_equal_scale_after_scale(transformer: Transformer) -> None:
    text, codes = texts(transformer, [3, 7]), inputs(2)
    outputs = step_by_step(transformer, text, codes)
    num_tokens = [SCHEDULE.num_tokens[scale] for scale in SCALES]
    cos, sin = (part[: sum(num_tokens)] for part in rope_table(SCHEDULE, SIZES.head_width))
    mask = block_causal_mask(num_tokens, torch.device("cpu"))
    together = transformer.forward_teacher_forced(codes, text, (cos, sin), mask)
    apart = torch.cat([transformer.logits(x, text) for x in outputs], dim=1)
    torch.testing.assert_close(together, apart, atol=2e-4, rtol=1e-4)


def test_text_is_projected_the_same_alone_and_padded(transformer: Transformer) -> None:
    features = torch.randn(2, 9, 256, generator=torch.Generator().manual_seed(3))
    alone = TextState.stack(
        [transformer.encode_text(features[:1, :4], [4]), transformer.encode_text(features[1:], [9])], TextPadding.NONE
    )
    for padding in (TextPadding.NONE, TextPadding.LONGEST):
        padded = transformer.encode_text(features, [4, 9], padding)
        torch.testing.assert_close(padded.pooled, alone.pooled, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(padded.shared_modulation, alone.shared_modulation, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(padded.keys_values[:, :, 1], alone.keys_values[:, :, 1], atol=1e-5, rtol=1e-4)
    assert alone.layout.lengths == (4, 9) and alone.first_rows(1).layout.lengths == (4,)


def guidance(*strengths: float) -> Guidance:
    values = torch.tensor(strengths)[:, None, None]
    return Guidance(values, 1 - values)


def test_guidance_mixes_each_image_with_its_own_strength() -> None:
    x = torch.randn(4, 3, 5)
    mixed = guidance(3.0, 1.0).mix(x)
    torch.testing.assert_close(mixed[0], 3 * x[0] - 2 * x[2])
    assert torch.equal(mixed[1], x[1])


def test_guidance_inside_the_network(transformer: Transformer) -> None:
    """After block i both halves are the mixture, and what follows runs on it."""
    text, codes = texts(transformer, [4, 4]), inputs(1)
    plain = step_by_step(transformer, text, codes)
    last = step_by_step(transformer, text, codes, {2: guidance(3.0)})
    # After the last block: mixing is all that happens.
    torch.testing.assert_close(last[4][0], 3 * plain[4][0] - 2 * plain[4][1], atol=1e-4, rtol=1e-4)
    assert torch.equal(last[4][0], last[4][1])
    inner = step_by_step(transformer, text, codes, {1: guidance(3.0)})
    assert not torch.allclose(inner[4], last[4], atol=1e-2)
    # The halves go on with their own texts, so they differ again after the next block.
    assert not torch.equal(inner[4][0], inner[4][1])
    nothing = step_by_step(transformer, text, codes, {2: guidance(1.0)})
    torch.testing.assert_close(nothing[4][0], plain[4][0])


def test_bfloat16_runs_on_a_cpu_and_is_near_float32(transformer: Transformer) -> None:
    rounded = new_transformer().to_dtype(torch.bfloat16)
    exact_parts = {name.split(".")[0] for name, part in rounded.named_parameters() if part.dtype == torch.float32}
    assert exact_parts == set(Transformer.FLOAT32_PARTS)
    codes, results = inputs(1), []
    for model in (transformer, rounded):
        text = texts(model, [5, 5])
        results.append(model.logits(step_by_step(model, text, codes)[-1], text))
    exact, ours = results
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() < 0.1 * exact.abs().max()
    assert 0 < (ours - exact).square().mean().sqrt() < 0.02 * exact.std()


def test_seeded_weights() -> None:
    first, again = new_transformer().state_dict(), new_transformer().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="head width divisible by 4"):
        TransformerConfig(
            depth=1, width=90, num_heads=4, mlp_ratio=4, text_width=256, text_max_tokens=8, latent_channels=8,
            spatial_patchify=False,
        )  # fmt: skip
