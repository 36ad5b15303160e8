"""Starts a run from weights that exist: an exported model's, or the checkpoints of another run.

A source folder is one that `export` wrote, or holds `vae.pt` and `transformer.pt` as the trainers save them (half
precision and no optimizer's state will do) with the `tokenizer.json` of the text encoder. Words are matched by name.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from skipvar.errors import InputError
from skipvar.training.common import Folders, append_log, load_checkpoint, read_history, save_checkpoint
from skipvar.training.export import load_exported_autoencoder
from skipvar.training.recipe import Recipe
from skipvar.training.text import build_tokenizer, match_embeddings
from skipvar.training.transformer import TextToBits
from skipvar.training.transformer import checkpoint_path as transformer_checkpoint
from skipvar.training.vae import checkpoint_path as vae_checkpoint
from skipvar.training.vae import encoder_sha256, load_autoencoder

PARTS = ("vae", "transformer")
_EMBEDDINGS = "text_encoder.shared.weight"


def restore(recipe: Recipe, folders: Folders, source: Path, parts: tuple[str, ...] = PARTS) -> None:
    """Makes the weights in `source` a run's checkpoints, to train on from there; refuses to overwrite any.

    `("transformer",)` alone takes its weights as a start for the bits of the run's own `vae.pt`.
    """
    targets = {"vae": vae_checkpoint(folders), "transformer": transformer_checkpoint(folders)}
    for part in parts:
        if targets[part].exists():
            raise InputError(f"{targets[part]} is there: restoring would overwrite a run; move it away first")
    if "vae" in parts:
        with _told(source):
            start = _read_vae(source)
        _save_start(targets["vae"], start, folders.run / "vae_log.jsonl")
        _remember(folders, source, "The autoencoder", start)
    if "transformer" in parts:
        with _told(source):
            start = _read_transformer(source)
            start.facts["encoder_sha256"] = encoder_sha256(load_autoencoder(folders).encoder)
            start.weights = _with_words_of(recipe, start, _read_vocabulary(source))
        _save_start(targets["transformer"], start, folders.run / "transformer_log.jsonl")
        _remember(folders, source, "The transformer", start)


@contextlib.contextmanager
def _told(source: Path) -> Iterator[None]:
    """What is wrong with a source's files, as one sentence."""
    try:
        yield
    except (AttributeError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise InputError(
            f"{source}: its weights cannot be used ({type(error).__name__}: {error}); give a folder that "
            "`jobs.train_emoji export` wrote, or one with the checkpoints of a run"
        ) from error


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


def _read_vae(source: Path) -> _Start:
    if _is_exported(source):
        record = json.loads((source / "training.json").read_text())["vae"]
        return _Start(load_exported_autoencoder(source).state_dict(), {"step": record["step"]}, record)
    state = load_checkpoint(source / "vae.pt", "vae")
    return _Start(state["ema"]["weights"], {"step": state["step"]}, None)


def _read_transformer(source: Path) -> _Start:
    if _is_exported(source):
        record = json.loads((source / "training.json").read_text())["transformer"]
        weights = {f"transformer.{name}": w for name, w in load_file(source / "transformer.safetensors").items()}
        for name, weight in load_file(source / "text_encoder" / "model.safetensors").items():
            weights[f"text_encoder.{name}"] = weight
        return _Start(weights, {key: record[key] for key in ("step", "num_samples")}, record)
    state = load_checkpoint(source / "transformer.pt", "transformer")
    return _Start(state["ema"]["weights"], {key: state[key] for key in ("step", "num_samples")}, None)


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


def _save_start(path: Path, start: _Start, log: Path) -> None:
    """A checkpoint without an optimizer's moments, which start anew from its step."""
    weights = {name: weight.detach().to(torch.float32) for name, weight in start.weights.items()}
    step = start.facts["step"]
    ema = {"weights": weights, "num_updates": step}
    save_checkpoint(path, {"model": weights, "ema": ema, "optimizer": None, "first_cold_step": step, **start.facts})
    if start.log is not None:
        append_log(log, start.log)
