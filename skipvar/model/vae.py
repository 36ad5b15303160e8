"""The convolutional autoencoder: no attention, residual blocks, GroupNorm (FORWARD.md section 7).

`levels[i]` works at 1/2^i of the image's side, in both halves. Generation needs the `Decoder` alone.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from skipvar.model.config import VaeConfig


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with eps 1e-6: 32 groups where they divide the channels, else 24, else 8 (small embedded widths)."""
    groups = next((n for n in (32, 24, 8) if channels % n == 0), None)
    if groups is None:
        raise ValueError(f"{channels} channels are not divisible by 32, 24 or 8")
    return nn.GroupNorm(groups, channels, eps=1e-6)


def conv3x3(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A 3x3 convolution with bias that keeps height and width (a border of zeros)."""
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1)


class ResBlock(nn.Module):
    """`x + conv2(swish(norm2(conv1(swish(norm1(x))))))`, with a 1x1 convolution on `x` where the width changes."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = conv3x3(channels_in, channels_out)
        self.norm2 = group_norm(channels_out)
        self.conv2 = conv3x3(channels_out, channels_out)
        self.shortcut = nn.Conv2d(channels_in, channels_out, kernel_size=1) if channels_in != channels_out else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class DecoderLevel(nn.Module):
    """Residual blocks at one resolution, then (`upsample`) nearest x2 and a convolution."""

    def __init__(self, channels_in: int, channels_out: int, num_blocks: int, has_upsample: bool) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * num_blocks
        self.blocks = nn.ModuleList(ResBlock(a, b) for a, b in pairwise(widths))
        self.upsample = conv3x3(channels_out, channels_out) if has_upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.upsample is None else self.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class EncoderLevel(nn.Module):
    """Residual blocks at one resolution, then (`downsample`) a convolution of stride 2."""

    def __init__(self, channels_in: int, channels_out: int, num_blocks: int, has_downsample: bool) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * num_blocks
        self.blocks = nn.ModuleList(ResBlock(a, b) for a, b in pairwise(widths))
        self.downsample = nn.Conv2d(channels_out, channels_out, 3, stride=2) if has_downsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        # Padded on the right and below only, so that output cell i is centred on input cells 2i and 2i+1.
        return x if self.downsample is None else self.downsample(F.pad(x, (0, 1, 0, 1)))


class Decoder(nn.Module):
    """Latent `(B, dv, h, w)` to image `(B, 3, h*patch, w*patch)` in [-1, 1], clamped, in the weights' dtype."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.base_width * m for m in config.width_multipliers]
        top = len(widths) - 1
        self.conv_in = conv3x3(config.latent_channels, widths[top])
        self.mid = nn.ModuleList(ResBlock(widths[top], widths[top]) for _ in range(2))
        self.levels = nn.ModuleList(
            DecoderLevel(widths[min(i + 1, top)], widths[i], config.num_res_blocks + 1, has_upsample=i > 0)
            for i in range(top + 1)
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = conv3x3(widths[0], 3)

    def forward(self, z: Tensor) -> Tensor:
        return self.forward_unclamped(z).clamp(-1, 1)

    def forward_unclamped(self, z: Tensor) -> Tensor:
        """As `forward`, but values beyond [-1, 1] keep their gradient: for training."""
        x = self.conv_in(z.to(self.conv_in.weight.dtype))
        for block in self.mid:
            x = block(x)
        for level in reversed(self.levels):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Encoder(nn.Module):
    """Image `(B, 3, H, W)` in [-1, 1] to latent `(B, dv, H/patch, W/patch)`: the decoder mirrored."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.base_width * m for m in config.width_multipliers]
        top = len(widths) - 1
        self.conv_in = conv3x3(3, widths[0])
        self.levels = nn.ModuleList(
            EncoderLevel(widths[max(i - 1, 0)], widths[i], config.num_res_blocks, has_downsample=i < top)
            for i in range(top + 1)
        )
        self.mid = nn.ModuleList(ResBlock(widths[top], widths[top]) for _ in range(2))
        self.norm_out = group_norm(widths[top])
        self.conv_out = conv3x3(widths[top], config.latent_channels)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_in(image.to(self.conv_in.weight.dtype))
        for level in self.levels:
            x = level(x)
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))
