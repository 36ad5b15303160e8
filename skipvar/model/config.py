"""Sizes of the three networks. Plain values, saved as JSON beside the weights."""

from dataclasses import dataclass
from typing import Any

from skipvar.checks import is_text, is_whole, is_within, shown

MAX_SIZE, MAX_COUNT, MAX_LEVELS = 1 << 20, 1024, 10
"""More channels or tokens, and more blocks, levels or cells, than any network has: what is larger is damage."""


def _check_sizes(config: Any, *names: str, most: int = MAX_SIZE) -> None:
    """Raise `ValueError` for a size that is no whole number from 1 to `most`."""
    for name in names:
        if not _is_size(value := getattr(config, name), most):
            raise ValueError(f"{name} is {shown(value)}, a whole number from 1 to {most} is accepted")


def _is_size(value: Any, most: int) -> bool:
    return is_whole(value) and 1 <= value <= most


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of the next-scale transformer (Infinity, arXiv 2412.04431)."""

    depth: int
    """Number of blocks."""
    width: int
    """Channels `C` of the residual stream; `C / num_heads / 4` must be whole (RoPE over two axes in pairs)."""
    num_heads: int
    mlp_ratio: float
    """The MLP's hidden width is `round(C * mlp_ratio / 256) * 256`."""
    text_width: int
    """Channels of the text encoder's output."""
    text_max_tokens: int
    """Longest prompt in tokens; rows of the learned unconditional text."""
    latent_channels: int
    """Channels `dv` of the VAE's latent."""
    spatial_patchify: bool
    """Each token holds a 2x2 group of latent cells: bits a token `d = 4 * dv` instead of `dv`."""
    num_level_embeddings: int = 15
    """Rows of the level embedding: at least the number of scales."""

    def __post_init__(self) -> None:
        _check_sizes(self, "width", "num_heads", "text_width", "text_max_tokens", "latent_channels")
        _check_sizes(self, "depth", "num_level_embeddings", most=MAX_COUNT)
        if not is_within(self.mlp_ratio, 0, MAX_COUNT) or not 1 <= self.mlp_width <= MAX_SIZE:
            raise ValueError(f"mlp_ratio {shown(self.mlp_ratio)} gives no hidden width from 1 to {MAX_SIZE}")
        if not isinstance(self.spatial_patchify, bool):
            raise ValueError(f"spatial_patchify is {shown(self.spatial_patchify)}, true or false is accepted")
        if self.width % self.num_heads or self.head_width % 4:
            raise ValueError(f"width {self.width} over {self.num_heads} heads must give a head width divisible by 4")

    @property
    def head_width(self) -> int:
        """Channels of one attention head, a multiple of 4."""
        return self.width // self.num_heads

    @property
    def mlp_width(self) -> int:
        """Hidden width of a block's MLP: `width * mlp_ratio`, rounded to the nearest multiple of 256."""
        return round(self.width * self.mlp_ratio / 256) * 256

    @property
    def bits_per_token(self) -> int:
        """The `d` of all shapes: bits that are predicted for a token, and channels of its input."""
        return self.latent_channels * (4 if self.spatial_patchify else 1)

    @property
    def num_pooling_heads(self) -> int:
        """Heads of the pooled text condition (FORWARD.md section 1.4: narrower heads above width 4096)."""
        return self.text_width // (64 if self.width > 4096 else 128)


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """Sizes of the convolutional autoencoder; its latent is `latent_channels` at 1/`patch_size` of the image side."""

    latent_channels: int
    base_width: int
    width_multipliers: tuple[int, ...]
    """Width of each level over `base_width`, full resolution first; each level after the first halves the side."""
    num_res_blocks: int
    """Residual blocks a level of the encoder; the decoder has one more."""

    def __post_init__(self) -> None:
        _check_sizes(self, "latent_channels", "base_width")
        _check_sizes(self, "num_res_blocks", most=MAX_COUNT)
        levels = self.width_multipliers
        if not 1 <= len(levels) <= MAX_LEVELS or not all(_is_size(level, MAX_COUNT) for level in levels):
            raise ValueError(
                f"width_multipliers must be whole numbers from 1 to {MAX_COUNT}, up to {MAX_LEVELS} of them"
            )

    @property
    def patch_size(self) -> int:
        """Pixels that a latent cell covers along each side."""
        return 2 ** (len(self.width_multipliers) - 1)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The scale schedules of a model: for each aspect ratio (height / width) the token grids `(h, w)` of all scales."""

    grids: dict[str, tuple[tuple[int, int], ...]]
    """Ratio key (as a decimal string) to its full list of grids."""
    sizes: dict[str, int]
    """Size name to the number of leading scales it keeps."""
    default_size: str

    def __post_init__(self) -> None:
        if not self.grids:
            raise ValueError("grids has no aspect ratio")
        for ratio, grids in self.grids.items():
            if not is_within(float(ratio), 1e-3, 1e3):
                raise ValueError(f"grids has the ratio {shown(ratio)}, height / width as a number is accepted")
            if not grids or not all(_is_size(side, MAX_COUNT) for grid in grids for side in grid):
                raise ValueError(f"grids of ratio {shown(ratio)} need pairs of whole numbers from 1 to {MAX_COUNT}")
        fewest = min(len(grids) for grids in self.grids.values())
        for size, count in self.sizes.items():
            if not _is_size(count, fewest):
                raise ValueError(f"size {shown(size)} keeps {shown(count)} scales, there are {fewest}")
        if self.default_size not in self.sizes:
            raise ValueError(f"default_size {self.default_size!r} is not one of {', '.join(self.sizes)}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that fixes a model's computation but its weights."""

    name: str
    transformer: TransformerConfig
    vae: VaeConfig
    schedules: ScheduleConfig

    def __post_init__(self) -> None:
        if not is_text(self.name):
            raise ValueError("name must be a text")
