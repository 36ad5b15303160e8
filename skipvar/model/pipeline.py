"""The three networks of a model, loaded together: text encoder, transformer, VAE decoder."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from skipvar.config import ModelSection
from skipvar.errors import ConfigError
from skipvar.model.bsq import latent_grid
from skipvar.model.checkpoint import decoder_weights, transformer_weights
from skipvar.model.config import ModelConfig
from skipvar.model.device import find_device, find_dtype
from skipvar.model.identity import NETWORKS, Files, find_model, sha256_of
from skipvar.model.presets import PRESETS
from skipvar.model.rope import rope_table
from skipvar.model.schedules import Schedule, find_schedule
from skipvar.model.text_encoder import RandomTextEncoder, T5TextEncoder, TextEncoder
from skipvar.model.transformer import Transformer
from skipvar.model.vae import Decoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Pipeline:
    """A model on one device, ready to run: its networks are cast and moved. Weights are never changed after that."""

    config: ModelConfig
    transformer: Transformer
    decoder: Decoder
    text_encoder: TextEncoder
    dtype: torch.dtype
    device: torch.device
    weights_sha256: dict[str, str]
    """Of each network's file or folder; for random weights a word that names the seed."""
    _rope: dict[Schedule, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.transformer.to_dtype(self.dtype).to(self.device).eval().requires_grad_(False)
        self.decoder.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)

    def schedule(self, aspect_ratio: float, size: str | None) -> Schedule:
        """The schedule nearest to an aspect ratio; raises `RowError` where the model has none."""
        return find_schedule(self.config.schedules, aspect_ratio, size)

    def rope(self, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all tokens of a schedule on the device, `(tokens, c / 2)` float32."""
        if schedule not in self._rope:
            cos, sin = rope_table(schedule, self.config.transformer.head_width)
            self._rope[schedule] = (cos.to(self.device), sin.to(self.device))
        return self._rope[schedule]

    def latent_grid(self, schedule: Schedule) -> tuple[int, int]:
        """Cells of the VAE's latent at the schedule's last scale."""
        return latent_grid(schedule.grids[-1], self.config.transformer.spatial_patchify)

    def decode(self, code_sum: Tensor) -> Tensor:
        """Running code sums `(B, dv, h, w)` -> images `(B, 3, H, W)` float32 in [-1, 1].

        On a CPU one after the other, which costs nothing there: some convolutions round differently in other batches.
        """
        parts = code_sum.to(self.dtype).split(1 if self.device.type == "cpu" else max(1, len(code_sum)))
        return torch.cat([self.decoder(part) for part in parts]).float()


def to_uint8(images: Tensor) -> Tensor:
    """`(B, 3, H, W)` in [-1, 1] -> `(B, H, W, 3)` uint8 RGB, truncated as upstream does."""
    return ((images + 1) / 2).permute(0, 2, 3, 1).mul(255).to(torch.uint8)


def load_pipeline(section: ModelSection) -> Pipeline:
    """Loads the model that a configuration names; its paths must be local (`s3://` is fetched by the caller).

    Raises `ConfigError` and `ModelError`, one sentence for each mistake of the user's.
    """
    name = find_device(section.device)
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device is cuda, but torch sees no CUDA device here (use cpu or auto)")
    device, dtype = torch.device(name), DTYPES[find_dtype(section.dtype, name)]
    if section.path and section.path.startswith("random:"):
        return _random_pipeline(PRESETS[section.name], section.path, dtype, device)
    found = find_model(section, Files())
    paths = {name: Path(path) for name, path in found.paths.items()}
    transformer, decoder = Transformer(found.config.transformer), Decoder(found.config.vae)
    load_weights(transformer, decoder, paths["transformer"], paths["vae"])
    max_tokens = found.config.transformer.text_max_tokens
    return Pipeline(
        config=found.config,
        transformer=transformer,
        decoder=decoder,
        text_encoder=T5TextEncoder.load(paths["text_encoder"], max_tokens=max_tokens, dtype=dtype, device=device),
        dtype=dtype,
        device=device,
        weights_sha256={name: sha256_of(path) for name, path in paths.items()},
    )


def load_weights(transformer: Transformer, decoder: Decoder, transformer_path: Path, vae_path: Path) -> None:
    """Loads upstream's files, or those of a converted folder, into our networks. Raises `ModelError`."""
    transformer.load_state_dict(transformer_weights(transformer, transformer_path))
    decoder.load_state_dict(decoder_weights(decoder, vae_path))


def _random_pipeline(config: ModelConfig, path: str, dtype: torch.dtype, device: torch.device) -> Pipeline:
    """Seeded random weights, by their `random:SEED`."""
    sizes, seed = config.transformer, int(path.removeprefix("random:"))
    transformer = Transformer(sizes)
    transformer.init_weights(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(config.vae)
    return Pipeline(
        config=config,
        transformer=transformer,
        decoder=decoder,
        text_encoder=RandomTextEncoder(
            text_width=sizes.text_width, max_tokens=sizes.text_max_tokens, seed=seed, device=device
        ),
        dtype=dtype,
        device=device,
        weights_sha256=dict.fromkeys(NETWORKS, path),
    )
