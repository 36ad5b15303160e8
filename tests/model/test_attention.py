"""Attention over text: groups by length are the mask, and padding is never seen."""

import pytest
import torch

from skipvar.model.attention import TextLayout, TextPadding

CPU = torch.device("cpu")


@pytest.mark.parametrize("lengths", [[5, 5, 5], [1, 9, 4, 9], [3], [2, 8]])
def test_groups_equal_the_mask(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(len(lengths), 2, 6, 16, generator=generator)
    keys, values = torch.randn(2, len(lengths), 2, max(lengths), 16, generator=generator)
    groups = TextLayout.of(lengths, CPU, TextPadding.NONE).attend(queries, keys, values)
    masked = TextLayout.of(lengths, CPU, TextPadding.LONGEST).attend(queries, keys, values)
    torch.testing.assert_close(groups, masked, atol=1e-5, rtol=1e-5)
    for row, length in enumerate(lengths):
        weights = (queries[row] @ keys[row, :, :length].transpose(1, 2) / 4).softmax(-1)
        torch.testing.assert_close(groups[row], weights @ values[row, :, :length], atol=1e-5, rtol=1e-5)


def test_padding_is_never_seen() -> None:
    queries, keys, values = torch.randn(3, 2, 1, 4, 8).unbind(0)
    keys[1, :, 2:] = values[1, :, 2:] = 1e30
    for padding in (TextPadding.NONE, TextPadding.LONGEST):
        assert TextLayout.of([4, 2], CPU, padding).attend(queries, keys, values).abs().max() < 100
