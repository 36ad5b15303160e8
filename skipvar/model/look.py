"""A look at a model's files before anything is started: what headers and JSON tell is not left for a replica to find.

Weights are not read. No torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from skipvar.errors import ModelError, first_line
from skipvar.model.config import ModelConfig

_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")

Shapes = dict[str, tuple[int, ...]]
"""Tensors' shapes by name."""


def look_at_model(paths: Mapping[str, str], config: ModelConfig, *, is_converted: bool) -> None:
    """Raise `ModelError` where a file of a model is missing, cut off, or belongs to networks of other sizes.

    `paths`: of each network; those of S3 are not looked at. Of upstream's files (not `is_converted`) only the text
    encoder's sizes are known by name here.
    """
    sizes = {"transformer": _transformer_shapes(config), "vae": _vae_shapes(config)}
    for name, path in paths.items():
        if is_absent(path):
            missing = "is missing; convert the model again (jobs.convert_checkpoint)"
            raise ModelError(f"{path} {missing}" if is_converted else f"{path}: no such weights file or folder")
        if "://" in path:
            continue
        if name == "text_encoder":
            look_at_text_encoder(Path(path), config)
        else:
            _compare(Path(path), look_at_weights(Path(path)), sizes[name] if is_converted else {})


def is_absent(path: str) -> bool:
    """Whether nothing lies at a path of this machine; what S3 holds is not known."""
    try:
        return "://" not in path and not Path(path).exists()
    except (OSError, ValueError):  # a name too long for any file
        return True


def look_at_weights(path: Path) -> Shapes:
    """The shapes in a safetensors file or a folder with some; none of other kinds of files.

    Raises `ModelError` where a file is cut off, an index names a file that is not there, or there are no weights.
    """
    if path.is_dir():
        indices = sorted(path.glob("*.index.json"))
        files = read_index(indices[0])[1] if indices else sorted(path.glob("*.safetensors"))
        return {name: shape for file in files for name, shape in look_at_weights(file).items()}
    if path.stat().st_size == 0:
        raise ModelError(f"{path}: the file is empty; fetch or convert it again")
    return _header(path) if path.suffix == ".safetensors" else {}


def read_index(path: Path) -> tuple[set[str], list[Path]]:
    """The tensors that an index of shards (`*.index.json`) lists, and the shards. Raises `ModelError`."""
    content = read_object(path, "an index of shards")
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(_is_file_name(name) for name in shards.values()):
        raise ModelError(f"{path}: no index of shards; its weight_map must name for each tensor a file beside it")
    files = [path.parent / name for name in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{path}: names {file.name}, which is not there; fetch the whole folder again")
    return set(shards), files


def look_at_text_encoder(folder: Path, config: ModelConfig) -> None:
    """Raise `ModelError` where a T5's folder lacks a part, or its features or its tokenizer are of another size."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no text encoder there (expected a folder with config.json, weights and tokenizer)")
    content = read_object(folder / "config.json", "a T5's configuration")
    sizes = {name: content.get(name) for name in ("d_model", "num_layers", "vocab_size")}
    if content.get("model_type") not in ("t5", "mt5", "umt5") or not all(_is_size(size) for size in sizes.values()):
        raise ModelError(f"{folder / 'config.json'}: not a T5's configuration (it lacks model_type t5 or a size)")
    width = config.transformer.text_width
    if sizes["d_model"] != width:
        raise ModelError(f"{folder}: its features have {sizes['d_model']} channels, the model's text_width is {width}")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{folder}: no tokenizer there; one of {', '.join(_TOKENIZER_FILES)} is needed")
    if (folder / "tokenizer.json").is_file():
        _check_tokenizer(folder / "tokenizer.json", int(sizes["vocab_size"] or 0))
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ModelError(f"{folder}: no weights there (model.safetensors, shards with an index, or pytorch_model.bin)")
    shapes = look_at_weights(folder)
    expected = {"shared.weight": (sizes["vocab_size"], width)} if "shared.weight" in shapes else {}
    if shapes:
        last = f"encoder.block.{int(sizes['num_layers'] or 0) - 1}.layer.0.SelfAttention.q.weight"
        _compare(folder, shapes, {**expected, last: None})


def read_object(path: Path, what: str) -> dict[str, Any]:
    """A JSON file that holds an object; `ModelError` says that it is not `what`."""
    if path.exists() and not path.is_file():  # a device or a pipe would be read for ever
        raise ModelError(f"{path}: not {what} (it is no regular file)")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_object(content, str(path), what)


def parse_object(content: bytes, source: str, what: str) -> dict[str, Any]:
    """The object that JSON holds; `ModelError` says that `source` is not `what`."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise ModelError(f"{source}: not {what} (it is no valid JSON); fetch or convert the model again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{source}: not {what} (a JSON object is accepted)")
    return found


def _check_tokenizer(path: Path, vocab_size: int) -> None:
    content = read_object(path, "a tokenizer")
    model, added = content.get("model"), content.get("added_tokens") or []
    entries = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(entries, dict | list) or not isinstance(added, list):
        raise ModelError(f"{path}: not a tokenizer (it has no vocabulary); fetch or convert the model again")
    ids = list(entries.values()) if isinstance(entries, dict) else list(range(len(entries)))
    ids += [token.get("id") for token in added if isinstance(token, dict)]
    largest = max((id for id in ids if isinstance(id, int)), default=-1)
    if not 0 <= largest < vocab_size:
        raise ModelError(
            f"{path}: its largest token is {largest}, the encoder has rows for {vocab_size}; it is another T5's"
        )


def _transformer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...] | None]:
    """Tensors that tell a transformer's sizes; None: one of any shape."""
    sizes = config.transformer
    return {
        "unconditional_text": (sizes.text_max_tokens, sizes.text_width),
        "token_embedding.weight": (sizes.width, sizes.bits_per_token),
        "level_embedding": (sizes.num_level_embeddings, sizes.width),
        "head.weight": (2 * sizes.bits_per_token, sizes.width),
        f"blocks.{sizes.depth - 1}.mlp.up.weight": (sizes.mlp_width, sizes.width),
        f"blocks.{sizes.depth}.mlp.up.weight": (),  # there is no such block
    }


def _vae_shapes(config: ModelConfig) -> dict[str, tuple[int, ...] | None]:
    sizes = config.vae
    width = sizes.base_width * sizes.width_multipliers[-1]
    return {
        "decoder.conv_in.weight": (width, sizes.latent_channels, 3, 3),
        "decoder.conv_out.weight": (3, sizes.base_width * sizes.width_multipliers[0], 3, 3),
        f"decoder.levels.{len(sizes.width_multipliers) - 1}.blocks.{sizes.num_res_blocks}.conv1.weight": None,
    }


def _compare(path: Path, shapes: Shapes, expected: Mapping[str, tuple[int | None, ...] | None]) -> None:
    for name, wanted in expected.items():
        found = shapes.get(name)
        if wanted == ():
            if found is not None:
                raise ModelError(f"{path}: has {name}, which the model's configuration does not know")
        elif found is None:
            raise ModelError(f"{path}: lacks {name}, which the model's configuration asks for")
        elif wanted is not None and _without_ones(found) != _without_ones(wanted):
            raise ModelError(f"{path}: {name} has shape {found}, the model's configuration wants {wanted}")


def _without_ones(shape: tuple[int | None, ...]) -> list[int | None]:
    return [size for size in shape if size != 1]


def _header(path: Path) -> Shapes:
    """The tensors of a safetensors file, whose header must fit the file's length."""
    try:
        with safe_open(path, framework="np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from error
    except SafetensorError as error:
        raise ModelError(f"{path}: the file is cut off or damaged; fetch or convert it again") from error
    if not shapes:
        raise ModelError(f"{path}: holds no tensors")
    return shapes


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name
