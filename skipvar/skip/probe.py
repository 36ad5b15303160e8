"""The probe: two numbers that say how much an image still changes, and how fine it is (FORWARD.md section 9)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from skipvar.skip.features import LATENT_CELLS
from skipvar.types import Probe

FFT_RADIUS_SHARE = 0.4
"""Frequencies beyond this share of the half side count as high."""


@torch.inference_mode()
def take_probe(
    decode: Callable[[Tensor], Tensor], old_sum: Tensor, new_sum: Tensor, grid: tuple[int, int]
) -> list[Probe]:
    """The probe of each of B images, from two running code sums `(B, dv, H, W)` (before and after the decision scale)
    that are decoded at a small latent `grid`. Waits for the device.

    `decode` maps `(2B, dv, *grid)` to images `(2B, 3, H', W')` in [-1, 1].
    """
    small = F.interpolate(torch.cat([old_sum, new_sum]), size=grid, mode="bilinear", align_corners=False)
    old, new = decode(small).float().mean(dim=1).chunk(2)
    pairs = zip(sobel_change(old, new).tolist(), fft_high_frequency_ratio(new).tolist(), strict=True)
    return [Probe(sobel_change=change, fft_high_frequency_ratio=ratio) for change, ratio in pairs]


def sobel_change(old: Tensor, new: Tensor) -> Tensor:
    """Mean absolute change of the gradient magnitude: gray images `(B, H, W)` in [-1, 1] -> `(B,)`."""
    return (_sobel_magnitude(new) - _sobel_magnitude(old)).abs().mean(dim=(1, 2))


def _sobel_magnitude(gray: Tensor) -> Tensor:
    kernel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]], device=gray.device)
    gradients = F.conv2d(gray[:, None], torch.stack([kernel, kernel.T])[:, None], padding=1)
    return gradients.square().sum(dim=1).sqrt()


def fft_high_frequency_ratio(gray: Tensor) -> Tensor:
    """Share of the amplitude spectrum farther than the radius from its centre: gray `(B, H, W)` -> `(B,)`."""
    height, width = gray.shape[-2:]
    amplitude = torch.fft.fftshift(torch.fft.fft2(gray), dim=(-2, -1)).abs()
    rows = torch.arange(height, device=gray.device) - height // 2
    columns = torch.arange(width, device=gray.device) - width // 2
    radius = int(FFT_RADIUS_SHARE * min(height, width) / 2)
    is_high = rows[:, None].square() + columns.square() > radius**2
    return (amplitude * is_high).sum(dim=(1, 2)) / (amplitude.sum(dim=(1, 2)) + 1e-6)


@torch.inference_mode()
def small_latents(code_sum: Tensor) -> list[list[float]]:
    """Means of each channel of a code sum `(B, dv, H, W)` over `LATENT_CELLS` x `LATENT_CELLS` cells.

    For each image `dv * LATENT_CELLS**2` numbers: channel by channel, each row by row. Waits for the device.
    """
    cells: list[list[float]] = F.adaptive_avg_pool2d(code_sum, LATENT_CELLS).flatten(1).tolist()
    return cells
