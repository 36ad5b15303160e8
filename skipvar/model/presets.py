"""The model sizes that have a name. Variants are data: a table, no code."""

from skipvar.checks import check_one_of, require
from skipvar.config import ModelSection
from skipvar.model.config import ModelConfig, TransformerConfig, VaeConfig
from skipvar.model.schedules import EMOJI_SCHEDULES, INFINITY_SCHEDULES

_VAE_PATCH_16 = VaeConfig(latent_channels=32, base_width=128, width_multipliers=(1, 2, 4, 4, 4), num_res_blocks=2)
_VAE_PATCH_8 = VaeConfig(latent_channels=14, base_width=128, width_multipliers=(1, 2, 4, 4), num_res_blocks=2)


def _infinity(name: str, depth: int, width: int, num_heads: int, vae: VaeConfig = _VAE_PATCH_16) -> ModelConfig:
    """An Infinity of FORWARD.md section 0, with the text width of flan-t5-xl."""
    transformer = TransformerConfig(
        depth=depth,
        width=width,
        num_heads=num_heads,
        mlp_ratio=4,
        text_width=2048,
        text_max_tokens=512,
        latent_channels=vae.latent_channels,
        spatial_patchify=vae is _VAE_PATCH_8,
    )
    return ModelConfig(name=name, transformer=transformer, vae=vae, schedules=INFINITY_SCHEDULES)


EMOJI = ModelConfig(
    name="emoji",
    transformer=TransformerConfig(
        depth=8,
        width=256,
        num_heads=4,
        mlp_ratio=4,
        text_width=256,
        text_max_tokens=64,
        latent_channels=32,
        spatial_patchify=False,
    ),
    # Widths 16, 40, 80, 128: none but the coarsest divides by 24 or 32, so GroupNorm gets several channels a group.
    vae=VaeConfig(latent_channels=32, base_width=8, width_multipliers=(2, 5, 10, 16), num_res_blocks=1),
    schedules=EMOJI_SCHEDULES,
)
"""The embedded model, trained in this repository (skipvar/training)."""

PRESETS: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        EMOJI,
        _infinity("infinity_125m", 12, 768, 8),
        _infinity("infinity_1b", 24, 1536, 16),
        _infinity("infinity_2b", 32, 2048, 16),
        _infinity("infinity_8b", 40, 3584, 28, _VAE_PATCH_8),
        _infinity("infinity_20b", 58, 4608, 36, _VAE_PATCH_8),
    )
}


def find_preset(section: ModelSection) -> ModelConfig | None:
    """The preset that a configuration names, or None where a converted folder at `model.path` may tell the sizes.

    Raises `ConfigError` where there is none, or it needs weights.
    """
    if section.path is not None and not section.path.startswith("random:"):
        return None
    check_one_of("model.name", section.name, PRESETS)
    accepted = f"the place of its weights (only emoji's are embedded), or random:SEED; {section.name} needs one"
    require(section.path is not None or section.name == EMOJI.name, "model.path", None, accepted)
    return PRESETS[section.name]
