"""Starts a run from weights that exist: an exported model's, or the checkpoints of another run.

A source folder is one that `export` wrote, or holds `vae.pt` and `transformer.pt` as the trainers save them (half
precision and no optimizer's state will do) with the `tokenizer.json` of the text encoder. Words are matched by name.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from skipvar.errors import InputError
from skipvar.training.common import (
    Folders,
    append_log,
    checkpoint_path,
    load_checkpoint,
    read_history,
    save_checkpoint,
    telling,
)
from skipvar.training.export import load_exported_autoencoder
from skipvar.training.recipe import Recipe
from skipvar.training.text import build_tokenizer, match_embeddings
from skipvar.training.transformer import TextToBits
from skipvar.training.vae import encoder_sha256, load_autoencoder

_NAMES = {"vae": "The autoencoder", "transformer": "The transformer"}
_FACTS = {"vae": ("step",), "transformer": ("step", "num_samples")}
"""What a checkpoint holds beside weights, their average and the optimizer."""
PARTS = tuple(_NAMES)
_USABLE = "give a folder that `jobs.train_emoji export` wrote, or one with the checkpoints of a run"
_EMBEDDINGS = "text_encoder.shared.weight"


def restore(recipe: Recipe, folders: Folders, source: Path, parts: tuple[str, ...] = PARTS) -> None:
    """Makes the weights in `source` a run's checkpoints, to train on from there; refuses to overwrite any.

    `("transformer",)` alone takes its weights as a start for the bits of the run's own `vae.pt`.
    """
    for part in parts:
        if (target := checkpoint_path(folders.run, part)).exists():
            raise InputError(f"{target} is there: restoring would overwrite a run; move it away first")
    for part in parts:
        with telling(source, _USABLE):
            start = _read(source, part)
            if part == "transformer":
                start.facts["encoder_sha256"] = encoder_sha256(load_autoencoder(folders).encoder)
                start.weights = _with_words_of(recipe, start, _read_vocabulary(source))
        _save_start(folders, part, start)
        _remember(folders, source, _NAMES[part], start)


def _remember(folders: Folders, source: Path, what: str, start: "_Start") -> None:
    """The source's history and where it was left, for the card of what comes of it."""
    known = read_history(folders.history)
    earlier = [line for line in read_history(source / "training.json") if line not in known]
    line = f"{what} goes on from step {start.facts['step']:,} of `{source.resolve().name}`."
    folders.history.write_text(json.dumps([*known, *earlier, line], indent=1) + "\n")


@dataclass
class _Start:
    """One network's averaged weights, the checkpoint's other entries, and its last log line if it is known."""

    weights: dict[str, Tensor]
    facts: dict[str, Any]
    log: dict[str, Any] | None


def _is_exported(source: Path) -> bool:
    return (source / "training.json").is_file()


def _read(source: Path, part: str) -> _Start:
    if _is_exported(source):
        record = json.loads((source / "training.json").read_text())[part]
        return _Start(_exported_weights(source, part), {name: record[name] for name in _FACTS[part]}, record)
    state = load_checkpoint(source, part)
    return _Start(state["ema"]["weights"], {name: state[name] for name in _FACTS[part]}, None)


def _exported_weights(source: Path, part: str) -> dict[str, Tensor]:
    if part == "vae":
        return load_exported_autoencoder(source).state_dict()
    files = {"transformer": "transformer.safetensors", "text_encoder": "text_encoder/model.safetensors"}
    weights = {module: load_file(source / file) for module, file in files.items()}
    return {f"{module}.{name}": weight for module, part in weights.items() for name, weight in part.items()}


def _read_vocabulary(source: Path) -> dict[str, int]:
    path = source / ("text_encoder/tokenizer.json" if _is_exported(source) else "tokenizer.json")
    if not path.is_file():
        raise InputError(f"{path} is not there: it says which row of the word embeddings belongs to which word")
    vocabulary: dict[str, int] = json.loads(path.read_text())["model"]["vocab"]
    return vocabulary


def _with_words_of(recipe: Recipe, start: _Start, vocabulary: dict[str, int]) -> dict[str, Tensor]:
    """The weights, with the rows of today's words in place of the source's."""
    tokenizer = build_tokenizer()
    embeddings = TextToBits(recipe, tokenizer).text_encoder.get_input_embeddings().weight.detach()
    match_embeddings(embeddings, tokenizer, start.weights[_EMBEDDINGS].float(), vocabulary)
    return start.weights | {_EMBEDDINGS: embeddings}


def _save_start(folders: Folders, part: str, start: _Start) -> None:
    """A checkpoint without an optimizer's moments, which start anew from its step."""
    weights = {name: weight.detach().to(torch.float32) for name, weight in start.weights.items()}
    step = start.facts["step"]
    ema = {"weights": weights, "num_updates": step}
    state = {"model": weights, "ema": ema, "optimizer": None, "first_cold_step": step, **start.facts}
    save_checkpoint(folders.run, part, state)
    if start.log is not None:
        append_log(folders.log(part), start.log)
