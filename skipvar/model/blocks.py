"""One transformer block and the pooling of text into a condition vector (FORWARD.md sections 1.4 and 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipvar.model.attention import CrossAttention, Extend, SelfAttention, TextLayout
from skipvar.model.config import TransformerConfig
from skipvar.model.linear import Linear, empty_parameter

NORM_EPS = 1e-6


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last axis without weights, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS)


class Mlp(nn.Module):
    """`down(GELU_tanh(up(x)))`."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden_width)
        self.down = Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """Self-attention, cross-attention and MLP on a float32 residual stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.modulation = empty_parameter(6, config.width)
        self.self_attention = SelfAttention(config.width, config.num_heads)
        self.cross_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.cross_attention = CrossAttention(config.width, config.num_heads)
        self.mlp = Mlp(config.width, config.mlp_width)

    def forward(
        self,
        x: Tensor,
        shared_modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        extend: Extend,
        text_keys_values: Tensor,
        text_layout: TextLayout,
        mask: Tensor | None = None,
    ) -> Tensor:
        """`x: (n, L, C)` float32, `shared_modulation: (n, 6, C)` float32 -> `(n, L, C)` float32."""
        modulation = (self.modulation.float() + shared_modulation)[:, :, None].unbind(1)
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation
        x = x + self.self_attention(layer_norm(x) * (1 + scale1) + shift1, rope, extend, mask) * gate1
        x = x + self.cross_attention(self.normalise_for_text(x), text_keys_values, text_layout)
        return x + self.mlp(layer_norm(x) * (1 + scale2) + shift2) * gate2

    def normalise_for_text(self, x: Tensor) -> Tensor:
        """The LayerNorm before cross-attention, the one with weights: `(n, L, C)` float32 -> the same."""
        norm = self.cross_norm
        return F.layer_norm(x, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)


class TextPooling(nn.Module):
    """Pools a row's text tokens into one vector, with one learned query a head."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        heads = config.num_pooling_heads
        if not heads or config.width % heads:
            raise ValueError(f"text_width {config.text_width} gives {heads} pooling heads, width is {config.width}")
        self.query = empty_parameter(heads, config.width // heads)
        self.key_value = Linear(config.text_width, 2 * config.width, bias=False)
        self.v_bias = empty_parameter(config.width)
        self.projection = Linear(config.width, config.width)

    def forward(self, text: Tensor, layout: TextLayout) -> Tensor:
        """`text: (n, T, text_width)` -> `(n, C)`."""
        heads = self.query.shape[0]
        bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        keys, values = self.key_value(text, bias).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        queries = self.query[None, :, None].expand(len(text), -1, 1, -1).to(keys.dtype)
        return self.projection(layout.attend(queries, keys, values).flatten(1))
