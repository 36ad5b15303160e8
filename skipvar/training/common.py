"""What both trainings share: the loop, EMA, checkpoints, the log."""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from skipvar.errors import InputError
from skipvar.training.recipe import RateSchedule

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where a training run reads and writes."""

    packages: Path
    """The two `npm pack` archives."""
    run: Path
    """Checkpoints, latents, logs, and the weights' history."""

    @property
    def history(self) -> Path:
        """A JSON list of sentences, for the card: where weights came from that this run did not make itself."""
        return self.run / "history.json"


class Trainer(Protocol):
    """A network on its way: what `train` needs of it."""

    step: int
    first_cold_step: int
    """Where the optimizer's moments started from nothing."""

    def train_step(self, factor: float, seconds_left: float) -> float:
        """One step at `factor` of the learning rates; returns the leading process's `seconds_left`."""

    def restore(self) -> None:
        """Goes on from the run's checkpoint, if there is one."""

    def report(self) -> None:
        """Logs the losses since the last report (the VAE also its PSNR); the leading process alone calls it."""

    def save(self) -> None:
        """Writes the run's checkpoint, with all that `restore` needs; the leading process alone calls it."""


def train(trainer: Trainer, schedule: RateSchedule, minutes: float, checkpoint_seconds: float, is_leader: bool) -> None:
    """Trains up to the schedule's last step, or for `minutes`; the same command again goes on from there.

    With the same number of processes and the same precision an interruption changes nothing: what a step does depends
    on its number and what was saved.
    """
    trainer.restore()
    if trainer.step >= schedule.num_steps:
        logger.info("step %d of %d: nothing left to train", trainer.step, schedule.num_steps)
    end, last_saved = time.monotonic() + 60 * minutes, time.monotonic()
    is_over = trainer.step >= schedule.num_steps
    while not is_over:
        factor = rate_factor(schedule, trainer.step, trainer.first_cold_step)
        # The clock that counts is the leader's: every process hears it in the same step.
        seconds_left = trainer.train_step(factor, end - time.monotonic())
        is_over = trainer.step >= schedule.num_steps or seconds_left <= 0
        if is_leader and (is_over or time.monotonic() - last_saved > checkpoint_seconds):
            trainer.report()
            trainer.save()
            last_saved = time.monotonic()


def rate_factor(schedule: RateSchedule, step: int, first_cold_step: int) -> float:
    """Multiplier of the learning rates at a step."""
    warmup = min(1.0, (step - first_cold_step + 1) / schedule.warmup_steps)
    return warmup * min(1.0, (schedule.num_steps - step) / schedule.decay_steps)


class Ema:
    """Exponential moving average of a module's parameters (float32), with a warm-up: early steps average little."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._num_updates = 0
        self._source = dict(module.named_parameters())
        self.weights = {name: p.detach().clone() for name, p in self._source.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the weights; update n, from 1, has a decay of at most (1 + n) / (10 + n)."""
        self._num_updates += 1
        decay = min(self._decay, (1 + self._num_updates) / (10 + self._num_updates))
        torch._foreach_lerp_(list(self.weights.values()), list(self._source.values()), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """`weights`, the averages themselves (no copies), and `num_updates`."""
        return {"weights": self.weights, "num_updates": self._num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies in what `state_dict` gave; every parameter of the module must be there."""
        self._num_updates = state["num_updates"]
        for name, weight in self.weights.items():
            weight.copy_(state["weights"][name])


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes beside and renames, so that an interruption leaves the last good checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def load_checkpoint(path: Path, stage: str) -> dict[str, Any]:
    """Raises `InputError` where `stage` of `jobs.train_emoji` has not made it yet."""
    if not path.exists():
        raise InputError(f"{path} is not there: `python -m jobs.train_emoji {stage}` makes it")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's own error type is not public
        raise InputError(f"{path}: not a readable checkpoint; move it away, and `{stage}` makes a new one") from error
    return state


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
