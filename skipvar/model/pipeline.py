"""The three networks of a model, loaded together: text encoder, transformer, VAE decoder."""

import dataclasses
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipvar.config import ModelSection
from skipvar.errors import ConfigError, ModelError
from skipvar.model import checkpoint
from skipvar.model.bsq import latent_grid
from skipvar.model.config import ModelConfig, ScheduleConfig, TransformerConfig, VaeConfig
from skipvar.model.presets import PRESETS
from skipvar.model.rope import rope_table
from skipvar.model.schedules import Schedule, find_schedule
from skipvar.model.text_encoder import TextEncoder
from skipvar.model.transformer import Transformer
from skipvar.model.vae import Decoder

EMBEDDED_FOLDER = Path(__file__).parents[1] / "assets" / "emoji"
FORMAT = "skipvar-model-1"
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
        height, width = self.latent_grid(schedule)
        return height * self.config.vae.patch_size, width * self.config.vae.patch_size

    def decode(self, code_sum: Tensor) -> Tensor:
        """Running code sums `(B, dv, h, w)` -> images `(B, 3, H, W)` float32 in [-1, 1].

        On a CPU one after the other, which costs nothing there: some convolutions round differently in other batches.
        """
        parts = code_sum.to(self.dtype).split(1 if self.device.type == "cpu" else max(1, len(code_sum)))
        return torch.cat([self.decoder(part) for part in parts]).float()

    @property
    def config_hash(self) -> str:
        """Hash of the model's configuration: part of a run's fingerprint and of a policy's validity."""
        return checkpoint.sha256_of_json(dataclasses.asdict(self.config))


def to_uint8(images: Tensor) -> Tensor:
    """`(B, 3, H, W)` in [-1, 1] -> `(B, H, W, 3)` uint8 RGB, truncated as upstream does."""
    return ((images + 1) / 2).permute(0, 2, 3, 1).mul(255).to(torch.uint8)


def load_pipeline(section: ModelSection) -> Pipeline:
    """Loads the model that a configuration names; its paths must be local (`s3://` is fetched by the caller)."""
    device = resolve_device(section.device)
    dtype = resolve_dtype(section.dtype, device)
    if section.path and section.path.startswith("random:"):
        return _random_pipeline(section, dtype, device)
    if section.path is None and section.name == "emoji":
        return load_folder(EMBEDDED_FOLDER, dtype, device)
    if section.path is None:
        raise ConfigError(f"model.path is needed for {section.name}: its weights are not part of this package")
    path = Path(section.path)
    if (path / "config.json").is_file() and json.loads((path / "config.json").read_text()).get("format") == FORMAT:
        return load_folder(path, dtype, device)
    return _official_pipeline(section, dtype, device)


def load_folder(folder: Path, dtype: torch.dtype, device: torch.device) -> Pipeline:
    """A converted model: config.json, transformer.safetensors, vae.safetensors (`decoder.*`), text_encoder/."""
    config = read_config(folder / "config.json")
    transformer, decoder = Transformer(config.transformer), Decoder(config.vae)
    files = {"transformer": folder / "transformer.safetensors", "vae": folder / "vae.safetensors"}
    checkpoint.load_into(transformer, checkpoint.read_state(files["transformer"]), str(files["transformer"]))
    vae_state = checkpoint.read_state(files["vae"])
    decoder_state = {name.removeprefix("decoder."): tensor for name, tensor in vae_state.items() if _of_decoder(name)}
    checkpoint.load_into(decoder, decoder_state, str(files["vae"]))
    files["text_encoder"] = folder / "text_encoder"
    hashes = {name: checkpoint.sha256_of(path) for name, path in files.items()}
    return _assemble(config, transformer, decoder, files["text_encoder"], hashes, dtype, device)


def _of_decoder(name: str) -> bool:
    return not name.startswith("encoder.")


def read_config(path: Path) -> ModelConfig:
    """The model configuration written by `write_config`."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format is {content['format']!r}, expected {FORMAT!r}")
        vae, schedules = dict(content["vae"]), content["schedules"]
        vae["width_multipliers"] = tuple(vae["width_multipliers"])
        grids = {ratio: tuple((h, w) for h, w in grids) for ratio, grids in schedules["grids"].items()}
        return ModelConfig(
            name=content["name"],
            transformer=TransformerConfig(**content["transformer"]),
            vae=VaeConfig(**vae),
            schedules=ScheduleConfig(grids=grids, sizes=schedules["sizes"], default_size=schedules["default_size"]),
        )
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a model configuration ({error})") from error


def write_config(config: ModelConfig, path: Path) -> None:
    """Writes a model's configuration as JSON."""
    content: dict[str, Any] = {"format": FORMAT, **dataclasses.asdict(config)}
    path.write_text(json.dumps(content, indent=1) + "\n")


def _official_pipeline(section: ModelSection, dtype: torch.dtype, device: torch.device) -> Pipeline:
    """Upstream's files as they are published: transformer, VAE and T5 each at their own path."""
    absent = [key for key in ("vae_path", "text_encoder_path") if getattr(section, key) is None]
    if absent:
        raise ConfigError(f"model.{absent[0]} is needed: model.path {section.path} is not a converted folder")
    assert section.path and section.vae_path and section.text_encoder_path
    config = PRESETS[section.name]
    transformer, decoder = Transformer(config.transformer), Decoder(config.vae)
    load_official(transformer, decoder, Path(section.path), Path(section.vae_path))
    paths = {"transformer": section.path, "vae": section.vae_path, "text_encoder": section.text_encoder_path}
    hashes = {name: checkpoint.sha256_of(Path(path)) for name, path in paths.items()}
    return _assemble(config, transformer, decoder, Path(section.text_encoder_path), hashes, dtype, device)


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
    hashes = dict.fromkeys(("transformer", "vae", "text_encoder"), section.path)
    return _assemble(config, transformer, decoder, seed, hashes, dtype, device)


def _assemble(
    config: ModelConfig,
    transformer: Transformer,
    decoder: Decoder,
    text: Path | int,
    hashes: dict[str, str],
    dtype: torch.dtype,
    device: torch.device,
) -> Pipeline:
    """Casts and moves the networks; `text` is the encoder's folder, or the seed of a random one."""
    max_tokens = config.transformer.text_max_tokens
    if isinstance(text, int):
        width = config.transformer.text_width
        text_encoder = TextEncoder.random(text_width=width, max_tokens=max_tokens, seed=text, device=device)
    else:
        text_encoder = TextEncoder.load(text, max_tokens=max_tokens, dtype=dtype, device=device)
    return Pipeline(
        config=config,
        transformer=transformer.to_dtype(dtype).to(device).eval().requires_grad_(False),
        decoder=decoder.to(device=device, dtype=dtype).eval().requires_grad_(False),
        text_encoder=text_encoder,
        dtype=dtype,
        device=device,
        weights_sha256=hashes,
    )


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device is cuda, but torch sees no CUDA device here (use cpu or auto)")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on GPUs; on a CPU, what multiplies faster there (one kind made bfloat16 five times slower)."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16
    seconds = _product_seconds()
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.7 * seconds[torch.float32] else torch.float32


def _product_seconds() -> dict[torch.dtype, float]:
    """Best time of a square product in each dtype, of twelve taken by turns: other work on the machine hits both."""
    matrices = [torch.ones(1024, 1024, dtype=dtype) for dtype in DTYPES.values()]
    seconds = {matrix.dtype: math.inf for matrix in matrices}
    for _ in range(12):
        for matrix in matrices:
            start = time.perf_counter()
            matrix @ matrix
            seconds[matrix.dtype] = min(seconds[matrix.dtype], time.perf_counter() - start)
    return seconds
