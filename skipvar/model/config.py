"""Sizes of the three networks. Plain values, saved as JSON beside the weights."""

from dataclasses import dataclass


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
        if self.width % self.num_heads or self.head_width % 4:
            raise ValueError(f"width {self.width} over {self.num_heads} heads must give a head width divisible by 4")

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads

    @property
    def mlp_width(self) -> int:
        return round(self.width * self.mlp_ratio / 256) * 256

    @property
    def bits_per_token(self) -> int:
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

    @property
    def patch_size(self) -> int:
        return 2 ** (len(self.width_multipliers) - 1)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The scale schedules of a model: for each aspect ratio (height / width) the token grids `(h, w)` of all scales."""

    grids: dict[str, tuple[tuple[int, int], ...]]
    """Ratio key (as a decimal string) to its full list of grids."""
    sizes: dict[str, int]
    """Size name to the number of leading scales it keeps."""
    default_size: str


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that fixes a model's computation but its weights."""

    name: str
    transformer: TransformerConfig
    vae: VaeConfig
    schedules: ScheduleConfig
