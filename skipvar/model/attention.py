"""Attention over scales and over text (FORWARD.md section 3).

`n` rows, `L` tokens of the scale, `T` tokens seen, `C` width, `H` heads, `c` head width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipvar.model.linear import Linear, empty_parameter
from skipvar.model.rope import apply_rope

MAX_LOG_SCALE = math.log(100)

Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes a scale's keys and values `(n, H, L, c)`, returns all that its queries see `(n, H, T, c)`."""


class SelfAttention(nn.Module):
    """Cosine attention of a scale's tokens over all scales so far."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = empty_parameter(width)
        self.v_bias = empty_parameter(width)
        self.log_scale = empty_parameter(num_heads)
        self.projection = Linear(width, width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], extend: Extend, mask: Tensor | None = None) -> Tensor:
        """`x: (n, L, C)`, `rope`: cosines and sines `(L, c / 2)` -> `(n, L, C)`; `mask: (L, T)` only in training."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        queries, keys, values = self.qkv(x, bias).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        scale = self.log_scale.float().clamp(max=MAX_LOG_SCALE).exp()[:, None]
        queries = apply_rope(F.normalize(queries.float(), dim=-1, eps=1e-12) * scale, *rope).to(values.dtype)
        keys = apply_rope(F.normalize(keys.float(), dim=-1, eps=1e-12), *rope).to(values.dtype)
        all_keys, all_values = extend(keys.transpose(1, 2), values.transpose(1, 2))
        out = F.scaled_dot_product_attention(queries.transpose(1, 2), all_keys, all_values, attn_mask=mask, scale=1.0)
        return self.projection(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of a scale's tokens over the row's own text."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * width, bias=False)
        self.v_bias = empty_parameter(width)
        self.projection = Linear(width, width)

    def project_text(self, text: Tensor) -> Tensor:
        """Keys and values of text features, once an image: `(n, T, C)` -> `(2, n, H, T, c)`."""
        bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        return self.key_value(text, bias).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, keys_values: Tensor, layout: "TextLayout") -> Tensor:
        """`x: (n, L, C)`, `keys_values: (2, n, H, T, c)` padded as `layout` says -> `(n, L, C)`."""
        queries = self.query(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        out = layout.attend(queries, keys_values[0], keys_values[1])
        return self.projection(out.transpose(1, 2).flatten(2))


class TextPadding(Enum):
    """What rows with texts of several lengths share in cross-attention."""

    NONE = "none"
    """Nothing: rows of one length attend together, without padding. A row's bits do not depend on its neighbours' text
    where attention gives the same bits in any batch (CPU)."""
    LONGEST = "longest"
    """One masked call for all rows, as wide as the longest of them: faster on GPUs, without that promise."""
    FULL = "full"
    """One masked call, as wide as the model's longest text whatever is in the batch: shapes depend on no row."""


@dataclass(frozen=True)
class TextLayout:
    """Which text tokens each row of a padded batch really has, and how attention keeps to them."""

    lengths: tuple[int, ...]
    """Text tokens of each row."""
    width: int
    """Text tokens of every row with its padding."""
    groups: Sequence[tuple[Tensor | None, int]]
    """Rows `(m,)` int64 (None: all) that share one length, and the length; each group attends by itself."""
    mask: Tensor | None
    """`(n, 1, 1, width)` bool instead of groups."""

    @classmethod
    def of(
        cls, lengths: Sequence[int], device: torch.device, padding: TextPadding, max_tokens: int | None = None
    ) -> "TextLayout":
        """The layout of rows of these lengths; `max_tokens`, the model's longest text, is needed for full padding."""
        distinct = sorted(set(lengths))
        if padding is TextPadding.FULL:
            assert max_tokens is not None
            return cls._masked(lengths, max_tokens, device)
        if len(distinct) == 1:
            return cls(tuple(lengths), distinct[0], groups=[(None, distinct[0])], mask=None)
        if padding is TextPadding.LONGEST:
            return cls._masked(lengths, distinct[-1], device)
        rows = {length: [row for row, other in enumerate(lengths) if other == length] for length in distinct}
        groups = [(torch.tensor(rows[length], device=device), length) for length in distinct]
        return cls(tuple(lengths), distinct[-1], groups, mask=None)

    @classmethod
    def _masked(cls, lengths: Sequence[int], width: int, device: torch.device) -> "TextLayout":
        is_real = torch.arange(width, device=device) < torch.tensor(lengths, device=device)[:, None]
        return cls(tuple(lengths), width, groups=[], mask=is_real[:, None, None])

    def first_rows(self, num_rows: int) -> "TextLayout":
        """The layout of the first rows alone, in the same way."""
        lengths = self.lengths[:num_rows]
        if self.mask is not None:
            return TextLayout(lengths, self.width, groups=[], mask=self.mask[:num_rows])
        device = next((rows.device for rows, _ in self.groups if rows is not None), torch.device("cpu"))
        return TextLayout.of(lengths, device, TextPadding.NONE)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`queries: (n, H, L, c)`, `keys, values: (n, H, width, c)` -> `(n, H, L, c)`."""
        if self.mask is not None:
            return F.scaled_dot_product_attention(queries, keys, values, attn_mask=self.mask)
        if len(self.groups) == 1:
            length = self.groups[0][1]
            return F.scaled_dot_product_attention(queries, keys[:, :, :length], values[:, :, :length])
        out = torch.empty_like(queries)
        for rows, length in self.groups:
            out[rows] = F.scaled_dot_product_attention(queries[rows], keys[rows, :, :length], values[rows, :, :length])
        return out
