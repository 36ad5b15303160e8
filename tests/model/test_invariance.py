"""DESIGN.md, "Bits without neighbours": each operation that an image goes through, by itself, on one thread.

A row, or an image, must get the same bits alone as in any batch. The shapes are those that the emoji model and the
golden models run.
"""

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipvar.engine.self_check import ROW_PADDINGS
from skipvar.model.attention import TextLayout, TextPadding
from skipvar.model.config import ModelConfig
from skipvar.model.linear import Linear, set_row_padding
from skipvar.model.presets import PRESETS
from skipvar.skip.probe import fft_high_frequency_ratio, sobel_change

WIDTHS = [(256, 768), (256, 256), (256, 1024), (1024, 256), (256, 512), (32, 256), (256, 64), (128, 384), (56, 128)]
TOKENS = [1, 4, 9, 16, 25, 36, 64, 100, 169, 256]
BATCHES = [2, 3, 8]
generator = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def assert_invariant(function: Callable[[Tensor], Tensor], batch: Tensor) -> None:
    """Every image of a batch alone, and the batch's start, give the bits of the batch."""
    with torch.inference_mode():
        whole = function(batch)
        for index in range(len(batch)):
            assert torch.equal(function(batch[index : index + 1])[0], whole[index]), f"image {index} alone"
        assert torch.equal(function(batch[:-1]), whole[:-1]), "a smaller batch"
        assert torch.equal(function(batch.flip(0)), whole.flip(0)), "another order"


@pytest.mark.parametrize(("width_in", "width_out"), WIDTHS)
def test_linear_with_padded_rows(width_in: int, width_out: int) -> None:
    """Under one of the paddings that the engine's self-check tries; 16 on the processors seen so far."""
    layer = Linear(width_in, width_out)
    batches = [random(2 * size, tokens, width_in) for tokens in TOKENS for size in BATCHES]
    for padding in ROW_PADDINGS:
        set_row_padding(layer, padding)
        with contextlib.suppress(AssertionError):
            for batch in batches:
                assert_invariant(layer, batch)
            return
    pytest.fail(f"no padding of {ROW_PADDINGS} rows gives the same bits in any batch")


@pytest.mark.parametrize("rows", [1, 5, 15, 16, 17])
@pytest.mark.parametrize("bias", [True, False])
def test_padding_changes_no_number(rows: int, bias: bool) -> None:
    layer, x = Linear(24, 40, bias=bias), random(rows, 24)
    plain = layer(x)
    set_row_padding(layer, 16)
    torch.testing.assert_close(layer(x), plain)
    assert layer(x[None]).shape == (1, rows, 40)


def test_row_padding_reaches_every_linear_layer() -> None:
    from tests.model.golden_model import golden_transformer

    layers = [part for part in golden_transformer().modules() if isinstance(part, nn.Linear)]
    assert layers and all(isinstance(layer, Linear) and layer.pad_rows_to == 16 for layer in layers)


@pytest.mark.parametrize(("heads", "width"), [(4, 64), (2, 128), (1, 128)])
def test_attention(heads: int, width: int) -> None:
    for tokens, held in ((1, 1), (4, 5), (36, 91), (100, 255), (256, 680)):
        keys, values = random(2, 6, heads, held, width)

        def attend(queries: Tensor, keys: Tensor = keys, values: Tensor = values) -> Tensor:
            rows = queries[:, 0, 0, 0].long()  # a row carries its number, to find its keys in any order
            return F.scaled_dot_product_attention(queries[..., 1:], keys[rows], values[rows], scale=1.0)

        queries = random(6, heads, tokens, width + 1)
        queries[..., 0] = torch.arange(6.0)[:, None, None]
        assert_invariant(attend, queries)


def test_attention_to_text_of_mixed_lengths() -> None:
    lengths = [7, 23, 7, 1, 41, 23]
    queries, keys, values = random(6, 4, 36, 64), random(6, 4, 41, 64), random(6, 4, 41, 64)
    whole = TextLayout.of(lengths, torch.device("cpu"), TextPadding.NONE).attend(queries, keys, values)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        layout = TextLayout.of([length], torch.device("cpu"), TextPadding.NONE)
        alone = layout.attend(queries[one], keys[one, :, :length], values[one, :, :length])
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("width", [64, 128, 256])
def test_layer_norm(width: int) -> None:
    for tokens in (1, 36, 256):
        assert_invariant(lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-6), random(5, tokens, width))


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (128, 128), (144, 96), (15, 15)])
def test_fourier_transform(size: tuple[int, int]) -> None:
    assert_invariant(torch.fft.fft2, random(4, *size))
    assert_invariant(fft_high_frequency_ratio, random(4, *size))


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (128, 128), (144, 96), (15, 15)])
def test_sobel(size: tuple[int, int]) -> None:
    assert_invariant(lambda pair: sobel_change(pair[:, 0], pair[:, 1]), random(4, 2, *size))


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@pytest.mark.parametrize("function", [F.silu, gelu, torch.tanh, torch.exp])
def test_functions_of_single_numbers(function: Callable[[Tensor], Tensor]) -> None:
    """torch rounds silu and gelu otherwise in the scalar tail of a loop, after the last whole 32 numbers: an image must
    have a multiple of 32 of them to be at the same place of the loop in any batch."""
    assert_invariant(function, random(5, 7, 32))


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_every_model_has_rows_of_whole_vectors(config: ModelConfig) -> None:
    """Those functions see rows of these widths; the decoder runs one image at a time (`Pipeline.decode`)."""
    assert config.transformer.width % 32 == config.transformer.mlp_width % 32 == 0


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_resizing(mode: str) -> None:
    options = {"align_corners": False} if mode == "bilinear" else {}
    assert_invariant(lambda x: F.interpolate(x, size=(13, 11), mode=mode, **options), random(4, 32, 8, 8))
