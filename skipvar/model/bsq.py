"""Bits, codes and the running code sum: binary spherical quantization over a pyramid of scales (FORWARD.md section 6).

Generation uses `bits_to_code`, `add_code` and `next_input`; the encoder's side, `quantize`, turns a latent into bits
with the very same functions, so that training and generation cannot drift apart. Every operation works on each image
alone. Legend: `B` images, `L = h*w` tokens of a scale, `d` bits a token, `dv` latent channels; a token grid is
`(h, w)`, the latent grid of the same scale `(H, W)` is equal to it, or twice as large with spatial patchify.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]


def latent_grid(grid: Grid, spatial_patchify: bool) -> Grid:
    """The latent cells `(H, W)` that the token grid `(h, w)` covers."""
    side = 2 if spatial_patchify else 1
    return grid[0] * side, grid[1] * side


def bits_to_code(bits: Tensor, grid: Grid, spatial_patchify: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bits `(B, L, d)`, bool or 0/1, row-major over `grid`, to the code `(B, dv, H, W)` with values +-1/sqrt(dv)."""
    batch, _, width = bits.shape
    cells = bits.transpose(1, 2).reshape(batch, width, *grid).to(dtype)
    if spatial_patchify:
        cells = F.pixel_shuffle(cells, 2)
    return (2 * cells - 1) / cells.shape[1] ** 0.5


def code_to_bits(code: Tensor, spatial_patchify: bool) -> Tensor:
    """The signs of `code (B, dv, H, W)` as bool bits `(B, L, d)`: positive is 1. Inverse of `bits_to_code`."""
    return cells_to_tokens(code, spatial_patchify) > 0


def cells_to_tokens(cells: Tensor, spatial_patchify: bool) -> Tensor:
    """Latent cells `(B, dv, H, W)` as row-major tokens `(B, L, d)`, same dtype."""
    if spatial_patchify:
        cells = F.pixel_unshuffle(cells, 2)
    return cells.flatten(2).transpose(1, 2)


def resize_linear(cells: Tensor, size: Grid) -> Tensor:
    """Latent cells `(B, dv, H, W)` at another grid, linearly and without antialiasing, up or down."""
    if cells.shape[-2:] == size:
        return cells
    return F.interpolate(cells, size=size, mode="bilinear", align_corners=False)


def add_code(code_sum: Tensor, code: Tensor, is_last: bool) -> Tensor:
    """The running sum `(B, dv, Hf, Wf)` plus one scale's `code (B, dv, H, W)`; the last scale is added as it is."""
    return code_sum + (code if is_last else resize_linear(code, (code_sum.shape[-2], code_sum.shape[-1])))


def next_input(code_sum: Tensor, next_grid: Grid, spatial_patchify: bool) -> Tensor:
    """What the next scale's tokens see: the running sum `(B, dv, Hf, Wf)` at `next_grid`, as `(B, L_next, d)`."""
    return cells_to_tokens(resize_linear(code_sum, latent_grid(next_grid, spatial_patchify)), spatial_patchify)


class Quantized(NamedTuple):
    """A latent as bits, scale by scale; each list holds one bool tensor `(B, L, d)` a scale."""

    targets: list[Tensor]
    """The right bits of each scale, given what was fed back before it."""
    fed: list[Tensor]
    """The bits that entered the running sum: the targets, with some flipped if that was asked for."""


def quantize(
    latent: Tensor,
    grids: Sequence[Grid],
    spatial_patchify: bool = False,
    flip_probability: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Quantized:
    """Multi-scale residual signs of `latent (B, dv, Hf, Wf)`: down by area, sign, up linearly, subtract, next scale.

    `grids` may be the first scales of a schedule: training sees the early ones alone more often than all.
    With `flip_probability (B,)` each fed bit of image `b` is turned over with that chance and the following targets
    are those that mend it: the bitwise self-correction of Infinity (arXiv 2412.04431).
    """
    code_sum = torch.zeros_like(latent)
    targets: list[Tensor] = []
    fed: list[Tensor] = []
    for grid in grids:
        cells = latent_grid(grid, spatial_patchify)
        bits = code_to_bits(F.interpolate(latent - code_sum, size=cells, mode="area"), spatial_patchify)
        targets.append(bits)
        if flip_probability is not None:
            noise = torch.rand(bits.shape, generator=generator, device=bits.device)
            bits = bits ^ (noise < flip_probability[:, None, None])
        fed.append(bits)
        code = bits_to_code(bits, grid, spatial_patchify, latent.dtype)
        code_sum = add_code(code_sum, code, is_last=cells == latent.shape[-2:])
    return Quantized(targets, fed)


def running_sums(bits: Sequence[Tensor], grids: Sequence[Grid], spatial_patchify: bool, final: Grid) -> list[Tensor]:
    """The running sum `(B, dv, *final)` float32 after each of the given scales; `final` is the last latent grid."""
    batch, _, width = bits[0].shape
    code_sum = torch.zeros(batch, width // (4 if spatial_patchify else 1), *final, device=bits[0].device)
    sums = []
    for scale_bits, grid in zip(bits, grids, strict=True):
        code = bits_to_code(scale_bits, grid, spatial_patchify)
        code_sum = add_code(code_sum, code, latent_grid(grid, spatial_patchify) == final)
        sums.append(code_sum)
    return sums
