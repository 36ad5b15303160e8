"""The three networks of a model, loaded together: text encoder, transformer, VAE decoder."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from skipvar.config import ModelSection
from skipvar.errors import ConfigError
from skipvar.model import checkpoint
from skipvar.model.bsq import latent_grid
from skipvar.model.config import ModelConfig
from skipvar.model.device import find_device, find_dtype
from skipvar.model.identity import (
    FORMAT,
    NETWORKS,
    converted_folder,
    official_paths,
    read_config,
    sha256_of,
)
from skipvar.model.presets import PRESETS
from skipvar.model.rope import rope_table
from skipvar.model.schedules import Schedule, find_schedule
from skipvar.model.text_encoder import RandomTextEncoder, T5TextEncoder, TextEncoder
from skipvar.model.transformer import Transformer
from skipvar.model.vae import Decoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Pipeline:
    """A model on one device, ready to run. Weights are never changed after loading."""

    config: ModelConfig
    transformer: Transformer
    decoder: Decoder
    text_encoder: TextEncoder
    dtype: torch.dtype
    device: torch.device
    weights_sha256: dict[str, str]
    """Of each network's file or folder; for random weights a word that names the seed."""
    _rope: dict[Schedule, tuple[Tensor, Tensor]] = field(default_factory=dict)

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

    def image_size(self, schedule: Schedule) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.config.image_size(schedule.grids[-1])

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
    """Loads the model that a configuration names; its paths must be local (`s3://` is fetched by the caller)."""
    name = find_device(section.device)
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device is cuda, but torch sees no CUDA device here (use cpu or auto)")
    device, dtype = torch.device(name), DTYPES[find_dtype(section.dtype, name)]
    if section.path and section.path.startswith("random:"):
        return _random_pipeline(section, dtype, device)
    folder = Path(converted_folder(section))
    config = folder / "config.json"
    if config.is_file() and json.loads(config.read_text()).get("format") == FORMAT:
        return load_folder(folder, dtype, device)
    return _official_pipeline(section, dtype, device)


def load_folder(folder: Path, dtype: torch.dtype, device: torch.device) -> Pipeline:
    """A converted model: config.json, transformer.safetensors, vae.safetensors (`decoder.*`), text_encoder/."""
    config = read_config(folder / "config.json")
    transformer, decoder = Transformer(config.transformer), Decoder(config.vae)
    files = {name: folder / file for name, file in NETWORKS.items()}
    checkpoint.load_into(transformer, checkpoint.read_state(files["transformer"]), str(files["transformer"]))
    vae_state = checkpoint.read_state(files["vae"])
    decoder_state = {name.removeprefix("decoder."): tensor for name, tensor in vae_state.items() if _of_decoder(name)}
    checkpoint.load_into(decoder, decoder_state, str(files["vae"]))
    hashes = {name: sha256_of(path) for name, path in files.items()}
    return _assemble(config, transformer, decoder, files["text_encoder"], hashes, dtype, device)


def _of_decoder(name: str) -> bool:
    return not name.startswith("encoder.")


def _official_pipeline(section: ModelSection, dtype: torch.dtype, device: torch.device) -> Pipeline:
    """Upstream's files as they are published: transformer, VAE and T5 each at their own path."""
    paths = {name: Path(path) for name, path in official_paths(section).items()}
    config = PRESETS[section.name]
    transformer, decoder = Transformer(config.transformer), Decoder(config.vae)
    load_official(transformer, decoder, paths["transformer"], paths["vae"])
    hashes = {name: sha256_of(path) for name, path in paths.items()}
    return _assemble(config, transformer, decoder, paths["text_encoder"], hashes, dtype, device)


def load_official(transformer: Transformer, decoder: Decoder, transformer_path: Path, vae_path: Path) -> None:
    """Loads upstream's transformer and VAE files into our networks."""
    source = str(transformer_path)
    state = checkpoint.transformer_state_from_official(checkpoint.read_state(transformer_path), source)
    checkpoint.fit_unconditional_text(state, transformer.config.text_max_tokens, source)
    checkpoint.load_into(transformer, state, source)
    vae_state = checkpoint.decoder_state_from_official(checkpoint.read_state(vae_path), str(vae_path))
    checkpoint.load_into(decoder, vae_state, str(vae_path))


def _random_pipeline(section: ModelSection, dtype: torch.dtype, device: torch.device) -> Pipeline:
    assert section.path
    config, seed = PRESETS[section.name], int(section.path.removeprefix("random:"))
    transformer = Transformer(config.transformer)
    transformer.init_weights(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(config.vae)
    hashes = dict.fromkeys(NETWORKS, section.path)
    sizes = config.transformer
    text = RandomTextEncoder(text_width=sizes.text_width, max_tokens=sizes.text_max_tokens, seed=seed, device=device)
    return _assemble(config, transformer, decoder, text, hashes, dtype, device)


def _assemble(
    config: ModelConfig,
    transformer: Transformer,
    decoder: Decoder,
    text: Path | TextEncoder,
    hashes: dict[str, str],
    dtype: torch.dtype,
    device: torch.device,
) -> Pipeline:
    """Casts and moves the networks; `text` is a T5 encoder's folder, or another encoder that is ready."""
    if isinstance(text, Path):
        max_tokens = config.transformer.text_max_tokens
        text = T5TextEncoder.load(text, max_tokens=max_tokens, dtype=dtype, device=device)
    return Pipeline(
        config=config,
        transformer=transformer.to_dtype(dtype).to(device).eval().requires_grad_(False),
        decoder=decoder.to(device=device, dtype=dtype).eval().requires_grad_(False),
        text_encoder=text,
        dtype=dtype,
        device=device,
        weights_sha256=hashes,
    )
