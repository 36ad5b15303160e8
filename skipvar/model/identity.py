"""Which model it is: its configuration and the hashes of its weights, known before any weight is loaded. No torch."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipvar.checks import check_one_of
from skipvar.config import ModelSection
from skipvar.errors import ConfigError, ModelError
from skipvar.model.config import ModelConfig, ScheduleConfig, TransformerConfig, VaeConfig
from skipvar.model.look import is_absent, look_at_model, parse_object, read_object
from skipvar.model.presets import PRESETS, find_preset

EMBEDDED_FOLDER = Path(__file__).parents[1] / "assets" / "emoji"
FORMAT = "skipvar-model-1"
NETWORKS = {"transformer": "transformer.safetensors", "vae": "vae.safetensors", "text_encoder": "text_encoder"}
"""The three networks, and where each lies in a converted folder."""


class Files:
    """Where weights and policies lie: here the files of this machine."""

    def read(self, uri: str) -> bytes:
        """A small file. Raises `FileNotFoundError`."""
        return Path(uri).read_bytes()

    def sha256(self, uri: str) -> str:
        """As `sha256_of`. Raises `FileNotFoundError`."""
        return sha256_of(Path(uri))


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model's sizes, and where its weights lie."""

    config: ModelConfig
    paths: Mapping[str, str]
    """Of each network's file or folder."""
    is_converted: bool
    """One folder under our names; else upstream's files, each at its own place."""
    told_sha256: Mapping[str, str] | None
    """Of each network, where a converted folder's config.json tells it."""


def identify(section: ModelSection, files: Files | None = None) -> tuple[ModelConfig, Mapping[str, str]]:
    """What decides a model's images besides the sampling: its configuration, and each network's SHA-256.

    A converted folder tells by its config.json, other weights are hashed; for random weights a word that names the seed
    stands for all three. Raises `ConfigError` where a path is missing from the configuration, `ModelError` where what
    lies there does not fit.
    """
    files = files or Files()
    if section.path and section.path.startswith("random:"):
        return PRESETS[section.name], dict.fromkeys(NETWORKS, section.path)
    found = find_model(section, files)
    look_at_model(found.paths, found.config, is_converted=found.is_converted)
    hashes = found.told_sha256
    if hashes is None:
        hashes = {name: _hash(files, path) for name, path in found.paths.items()}
    return found.config, hashes


def find_model(section: ModelSection, files: Files) -> ModelFiles:
    """Where the weights lie that a configuration names, in a converted folder or as upstream publishes them.

    Raises `ConfigError` where a path is missing from the configuration or nothing lies at `model.path`, `ModelError`
    for a config.json that is none.
    """
    find_preset(section)  # says what is wrong where there is no path
    place = str(EMBEDDED_FOLDER) if section.path is None else section.path.rstrip("/")
    source = f"{place}/config.json"
    try:
        content = parse_object(files.read(source), source, "a model configuration")
    except (OSError, ValueError):  # nothing there, or a name that no file can have
        content = {}
    if content.get("format") != FORMAT:
        return _official_files(section, place)
    hashes = content.get("weights_sha256")
    is_known = isinstance(hashes, dict) and all(isinstance(hashes.get(name), str) for name in NETWORKS)
    if hashes is not None and not is_known:
        raise ModelError(f"{source}: weights_sha256 must give a text for each of {', '.join(NETWORKS)}")
    paths = {name: f"{place}/{file}" for name, file in NETWORKS.items()}
    return ModelFiles(config=parse_config(content, source), paths=paths, is_converted=True, told_sha256=hashes)


def _official_files(section: ModelSection, place: str) -> ModelFiles:
    """The three networks as upstream publishes them."""
    if is_absent(place):
        raise ConfigError(f"model.path: {place} does not exist; give the model's folder or weights file")
    paths = {"transformer": section.path, "vae": section.vae_path, "text_encoder": section.text_encoder_path}
    named = {name: path for name, path in paths.items() if path is not None}
    for name in ("vae", "text_encoder"):
        if name not in named:
            raise ConfigError(f"model.{name}_path is needed: model.path {section.path} is not a converted folder")
    check_one_of("model.name", section.name, PRESETS)
    return ModelFiles(config=PRESETS[section.name], paths=named, is_converted=False, told_sha256=None)


def read_config(path: Path) -> ModelConfig:
    """The model configuration written by `write_config`."""
    content = read_object(path, "a model configuration")
    if content.get("format") != FORMAT:
        raise ModelError(f"{path}: not a model configuration (its format must be {FORMAT!r})")
    return parse_config(content, str(path))


def parse_config(content: Mapping[str, Any], source: str) -> ModelConfig:
    """The model configuration in the content of a config.json; `source` names it in the message of a `ModelError`."""
    try:
        vae, schedules = dict(content["vae"]), content["schedules"]
        vae["width_multipliers"] = tuple(vae["width_multipliers"])
        grids = {ratio: tuple((h, w) for h, w in grids) for ratio, grids in schedules["grids"].items()}
        return ModelConfig(
            name=content["name"],
            transformer=TransformerConfig(**content["transformer"]),
            vae=VaeConfig(**vae),
            schedules=ScheduleConfig(grids=grids, sizes=schedules["sizes"], default_size=schedules["default_size"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{source}: not a model configuration ({error})") from error


def write_config(config: ModelConfig, folder: Path) -> None:
    """Writes config.json beside the weights of a converted folder, with their hashes: last of all its files."""
    hashes = {name: sha256_of(folder / file) for name, file in NETWORKS.items() if (folder / file).exists()}
    content: dict[str, Any] = {"format": FORMAT, **dataclasses.asdict(config)}
    if hashes:
        content["weights_sha256"] = hashes
    (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n")


def config_sha256(config: ModelConfig) -> str:
    """Hash of a model's configuration: part of a run's fingerprint."""
    return sha256_of_json(dataclasses.asdict(config))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files (`sha256_of_tree`)."""
    if path.is_dir():
        files = {str(item.relative_to(path)): sha256_of(item) for item in path.rglob("*") if item.is_file()}
        return sha256_of_tree(files)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_tree(files: Mapping[str, str]) -> str:
    """SHA-256 of a folder, from its files' relative names and their SHA-256."""
    lines = [f"{name} {files[name]}\n" for name in sorted(files, key=lambda name: Path(name).parts)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sha256_of_json(content: object) -> str:
    """SHA-256 of a JSON-able value in canonical form."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _hash(files: Files, path: str) -> str:
    try:
        return files.sha256(path)
    except OSError as error:
        raise ModelError(f"{path}: no such weights file or folder") from error
