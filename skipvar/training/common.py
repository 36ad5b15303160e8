"""The run's folder: checkpoints, the log, where weights came from."""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from skipvar.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where a training run reads and writes."""

    packages: Path
    """The two `npm pack` archives."""
    run: Path
    """Checkpoints, latents, logs, and the weights' history."""

    def log(self, stage: str) -> Path:
        """One JSON line for each of a training's reports."""
        return self.run / f"{stage}_log.jsonl"

    @property
    def history(self) -> Path:
        """A JSON list of sentences, for the card: where weights came from that this run did not make itself."""
        return self.run / "history.json"


def checkpoint_path(folder: Path, stage: str) -> Path:
    """What a stage of `jobs.train_emoji` (`vae`, `encode`, `transformer`) leaves in the run's folder."""
    return folder / ("latents.pt" if stage == "encode" else f"{stage}.pt")


def save_checkpoint(folder: Path, stage: str, state: dict[str, Any]) -> None:
    """Writes beside and renames, so that an interruption leaves the last good checkpoint."""
    path = checkpoint_path(folder, stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def load_checkpoint(folder: Path, stage: str) -> dict[str, Any]:
    """Raises `InputError` where the stage has not left it there, or it is damaged."""
    path = checkpoint_path(folder, stage)
    if not path.exists():
        raise InputError(f"{path} is not there: `python -m jobs.train_emoji {stage}` makes it")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's own error type is not public
        raise InputError(f"{path}: not a readable checkpoint; move it away, and `{stage}` makes a new one") from error
    return state


@contextlib.contextmanager
def telling(source: Path, hint: str) -> Iterator[None]:
    """Turns what is wrong with a source's weights into an `InputError`, one sentence that ends with a hint."""
    try:
        yield
    except (AttributeError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise InputError(f"{source}: its weights cannot be used ({type(error).__name__}: {error}); {hint}") from error


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies in all parameters by name; raises `ValueError` where names or shapes are others."""
    own = dict(model.named_parameters())
    theirs, ours = ({(name, weight.shape) for name, weight in one.items()} for one in (weights, own))
    if theirs != ours:
        raise ValueError(f"{min(theirs ^ ours)[0]} is of another network")
    for name, parameter in own.items():
        parameter.copy_(weights[name])


def load_averaged(model: nn.Module, folder: Path, stage: str) -> None:
    """Gives a network the averaged weights of a training's checkpoint, to evaluate it; raises `InputError`."""
    state = load_checkpoint(folder, stage)
    with telling(checkpoint_path(folder, stage), f"`{stage}` of this recipe makes others"):
        load_weights(model, state["ema"]["weights"])
    model.eval()


def read_history(path: Path) -> list[str]:
    """The sentences of `Folders.history` or of an exported record; none where there is no such file."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    sentences: list[str] = found["history"] if isinstance(found, dict) else found
    return sentences


def append_log(path: Path, record: dict[str, Any]) -> None:
    """One JSON line, and the same to the logger."""
    line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()})
    logger.info("%s", line)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
