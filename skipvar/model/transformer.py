"""The next-scale transformer: text in, bit logits of a scale out (FORWARD.md sections 1 to 4 and 8).

`B` images, `n` rows that go through the blocks (`2B` under guidance: conditional rows first), `L` tokens of the scale,
`C` width, `d` bits a token. Products run in the weights' dtype; the residual stream, norms, modulation and head in
float32.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipvar.model.attention import TextLayout, TextPadding
from skipvar.model.blocks import Block, TextPooling, layer_norm
from skipvar.model.config import TransformerConfig
from skipvar.model.kv_cache import KeyValueCache
from skipvar.model.linear import Linear, empty_parameter


@dataclass(frozen=True)
class TextState:
    """All that the transformer needs of some rows' text; depends on the text alone, so it is computed once an image."""

    pooled: Tensor
    """`(n, C)`: the start token, and the condition of the modulations."""
    shared_modulation: Tensor
    """`(n, 6, C)` float32."""
    head_modulation: Tensor
    """`(n, 2, C)` float32: scale, shift."""
    keys_values: Tensor
    """`(depth, 2, n, H, T, c)`, padded with zeros to the layout's width."""
    layout: TextLayout

    @classmethod
    def stack(cls, states: Sequence["TextState"], padding: TextPadding, max_tokens: int | None = None) -> "TextState":
        """One batch of the rows of several states, in order; `max_tokens` is needed for full padding."""
        lengths = [length for state in states for length in state.layout.lengths]
        layout = TextLayout.of(lengths, states[0].pooled.device, padding, max_tokens)
        depth, two, _, heads, _, channels = states[0].keys_values.shape
        # Filled in place: a padded copy of every state would take the batch's memory once more.
        keys_values = states[0].keys_values.new_zeros(depth, two, len(lengths), heads, layout.width, channels)
        row = 0
        for state in states:
            num_rows, width = state.keys_values.shape[2], state.keys_values.shape[4]
            keys_values[:, :, row : row + num_rows, :, :width] = state.keys_values
            row += num_rows
        return cls(
            pooled=torch.cat([state.pooled for state in states]),
            shared_modulation=torch.cat([state.shared_modulation for state in states]),
            head_modulation=torch.cat([state.head_modulation for state in states]),
            keys_values=keys_values,
            layout=layout,
        )

    def first_rows(self, num_rows: int) -> "TextState":
        """The first rows alone: the conditional half once guidance has ended."""
        return TextState(
            pooled=self.pooled[:num_rows],
            shared_modulation=self.shared_modulation[:num_rows],
            head_modulation=self.head_modulation[:num_rows],
            keys_values=self.keys_values[:, :, :num_rows],
            layout=self.layout.first_rows(num_rows),
        )


@dataclass(frozen=True)
class Guidance:
    """Strength of classifier-free guidance of each image at one scale."""

    conditional: Tensor
    """`(B, 1, 1)` float32: `cfg`."""
    unconditional: Tensor
    """`(B, 1, 1)` float32: `1 - cfg`."""

    def mix(self, x: Tensor) -> Tensor:
        """`cfg * conditional + (1 - cfg) * unconditional`: `(2B, L, ...)` -> `(B, L, ...)`."""
        conditional, unconditional = x.chunk(2)
        return self.conditional * conditional + self.unconditional * unconditional


class Transformer(nn.Module):
    """Infinity's transformer (arXiv 2412.04431), scale by scale with a cache, or all scales at once for training."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.text_norm = empty_parameter(config.text_width)
        self.unconditional_text = empty_parameter(config.text_max_tokens, config.text_width)
        self.text_pooling = TextPooling(config)
        self.text_up = Linear(config.text_width, width)
        self.text_down = Linear(width, width)
        self.shared_modulation = Linear(width, 6 * width)
        self.start_position = empty_parameter(width)
        self.token_embedding = Linear(config.bits_per_token, width)
        self.level_embedding = empty_parameter(config.num_level_embeddings, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_modulation = Linear(width, 2 * width)
        self.head = Linear(width, 2 * config.bits_per_token)

    def init_weights(self, seed: int) -> None:
        """Seeded random weights to train from; as they are they draw noise."""
        generator = torch.Generator().manual_seed(seed)
        depth, width = self.config.depth, self.config.width
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                std = 0.0
            elif name.endswith("log_scale"):
                parameter.data.fill_(math.log(4))
                continue
            elif name.startswith("text_norm") or name.endswith("cross_norm.weight"):
                parameter.data.fill_(1.0)
                continue
            elif name.endswith("modulation"):
                std = width**-0.5
            elif parameter.ndim == 1 or name == "level_embedding":
                std = 0.02
            else:
                std = 0.7 * parameter.shape[-1] ** -0.5
            if name == "text_down.weight":
                std *= 5  # what cross-attention reads must have size one: quieter text was ignored for 500 steps
            if name.startswith("blocks.") and name.endswith(("projection.weight", "down.weight")):
                std /= (2 * depth) ** 0.5
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)

    FLOAT32_PARTS = ("text_norm", "shared_modulation", "head_modulation", "head")
    """Kept in float32 whatever the dtype of the products (FORWARD.md section 11)."""

    def to_dtype(self, dtype: torch.dtype) -> "Transformer":
        """Casts the weights in place, but for the parts that stay in float32."""
        for name, parameter in self.named_parameters():
            if name.split(".")[0] not in self.FLOAT32_PARTS:
                parameter.data = parameter.data.to(dtype)
        return self

    def encode_text(
        self, features: Tensor, lengths: Sequence[int], padding: TextPadding = TextPadding.NONE
    ) -> TextState:
        """`features: (n, T, text_width)` of the text encoder, of which row `i` has `lengths[i]` real tokens."""
        layout = TextLayout.of(lengths, features.device, padding)
        text = features.float()
        text = text * torch.rsqrt(text.square().mean(dim=-1, keepdim=True) + 1e-6) * self.text_norm
        pooled = self.text_pooling(text, layout)
        projected = self.text_down(F.gelu(self.text_up(text), approximate="tanh"))
        condition = F.silu(pooled.float())
        return TextState(
            pooled=pooled,
            shared_modulation=self.shared_modulation(condition).float().unflatten(-1, (6, -1)),
            head_modulation=self.head_modulation(condition).float().unflatten(-1, (2, -1)),
            keys_values=torch.stack([block.cross_attention.project_text(projected) for block in self._blocks()]),
            layout=layout,
        )

    def embed_start(self, text: TextState) -> Tensor:
        """The only token of scale 0: `(n, 1, C)` float32."""
        return (text.pooled.float() + self.start_position.float() + self.level_embedding[0].float())[:, None]

    def embed_tokens(self, codes: Tensor, scale: int) -> Tensor:
        """Tokens of a later scale from the resized running code sum: `(B, L, d)` -> `(B, L, C)` float32."""
        return self.token_embedding(codes).float() + self.level_embedding[scale].float()

    def forward(
        self,
        x: Tensor,
        text: TextState,
        rope: tuple[Tensor, Tensor],
        cache: KeyValueCache,
        *,
        write: bool,
        guidance_after_block: Mapping[int, Guidance] | None = None,
    ) -> Tensor:
        """Runs all blocks on one scale: `x: (n, L, C)` float32 -> `(n, L, C)` float32.

        `guidance_after_block` mixes the halves after these blocks (section 8); `write` keeps this scale in the cache.
        """
        for index, block in enumerate(self._blocks()):

            def extend(keys: Tensor, values: Tensor, layer: int = index) -> tuple[Tensor, Tensor]:
                return cache.extend(layer, keys, values, write=write)

            x = block(x, text.shared_modulation, rope, extend, text.keys_values[index], text.layout)
            if guidance_after_block and index in guidance_after_block:
                x = guidance_after_block[index].mix(x).repeat(2, 1, 1)
        if write:
            cache.advance(x.shape[1])
        return x

    def logits(self, x: Tensor, text: TextState) -> Tensor:
        """`(n, L, C)` -> `(n, L, 2d)` float32: for bit `j` the logits of 0 and 1 at `2j` and `2j + 1`.

        The text may have more rows than `x`: the first ones count.
        """
        return self.head_logits(x, text.head_modulation[: len(x)])

    def head_logits(self, x: Tensor, head_modulation: Tensor) -> Tensor:
        """`logits` with the modulation `(n, 2, C)` given: scale, then shift."""
        scale, shift = head_modulation[:, :, None].unbind(1)
        return self.head(layer_norm(x) * (1 + scale) + shift).float()

    def forward_teacher_forced(
        self, codes: Sequence[Tensor], text: TextState, rope: tuple[Tensor, Tensor], mask: Tensor
    ) -> Tensor:
        """All scales at once, for training.

        `codes[k - 1]: (n, L_k, d)` is the resized running code sum that scale `k >= 1` starts from; `rope` covers the
        tokens of these scales, and `mask: (L, L)` bool is True where a token may look (`block_causal_mask`).
        Returns logits `(n, L, 2d)` of scales `0 .. len(codes)`, concatenated.
        """
        embedded = [self.embed_tokens(tokens, scale) for scale, tokens in enumerate(codes, start=1)]
        x = torch.cat([self.embed_start(text), *embedded], dim=1)
        for index, block in enumerate(self._blocks()):
            x = block(x, text.shared_modulation, rope, _see_only_these, text.keys_values[index], text.layout, mask)
        return self.logits(x, text)

    def _blocks(self) -> Sequence[Block]:
        return self.blocks  # type: ignore[return-value]


def _see_only_these(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return keys, values


def block_causal_mask(num_tokens: Sequence[int], device: torch.device) -> Tensor:
    """`(L, L)` bool: a token sees its own scale and all earlier ones. `num_tokens`: of each scale."""
    scale = torch.repeat_interleave(torch.arange(len(num_tokens)), torch.tensor(num_tokens)).to(device)
    return scale[:, None] >= scale[None, :]
