"""What both trainings share: the loop, EMA, checkpoints, the log, sample sheets."""

import json
import logging
import math
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from skipvar.errors import InputError
from skipvar.model.pipeline import resolve_dtype
from skipvar.training.recipe import RateSchedule

logger = logging.getLogger(__name__)


@cache
def fast_dtype() -> torch.dtype:
    """bfloat16 where this processor multiplies faster in it, else float32; measured once in a process."""
    return resolve_dtype("auto", torch.device("cpu"))


def autocast() -> torch.autocast:
    """The precision that all training and encoding runs in."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype() is torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where a training run reads and writes."""

    packages: Path
    """The two `npm pack` archives."""
    run: Path
    """Checkpoints, latents, logs, sample sheets."""


class Trainer(Protocol):
    """A network on its way: what `train` needs of it."""

    step: int

    def train_step(self, factor: float, seconds_left: float) -> float:
        """One step at `factor` of the learning rates; returns the leading process's `seconds_left`."""

    def restore(self) -> bool:
        """Goes on from the run's checkpoint; False if there is none, or none of the optimizer: then warm up."""

    def save(self) -> None: ...

    def report(self) -> None: ...


def train(trainer: Trainer, schedule: RateSchedule, minutes: float, checkpoint_seconds: float, is_leader: bool) -> None:
    """Trains up to the schedule's last step, or for `minutes`; the same command again goes on from there.

    What a step does depends on the seed and its number alone, so an interruption changes nothing.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    is_warm = trainer.restore()
    if trainer.step >= schedule.num_steps:
        logger.info("step %d of %d: nothing left to train", trainer.step, schedule.num_steps)
        return
    first_cold_step = 0 if is_warm else trainer.step
    end, last_saved = time.monotonic() + 60 * minutes, time.monotonic()
    seconds_left = math.inf
    while trainer.step < schedule.num_steps and seconds_left > 0:
        factor = rate_factor(schedule, trainer.step, first_cold_step)
        # The clock that counts is the leader's: every process hears it in the same step.
        seconds_left = trainer.train_step(factor, end - time.monotonic())
        if is_leader and time.monotonic() - last_saved > checkpoint_seconds:
            trainer.save()
            trainer.report()
            last_saved = time.monotonic()
    if is_leader:
        trainer.save()
        trainer.report()


def rate_factor(schedule: RateSchedule, step: int, first_cold_step: int = 0) -> float:
    """Multiplier of the learning rates at a step; the optimizer's moments start from nothing at `first_cold_step`."""
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
        self._num_updates += 1
        decay = min(self._decay, (1 + self._num_updates) / (10 + self._num_updates))
        torch._foreach_lerp_(list(self.weights.values()), list(self._source.values()), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "num_updates": self._num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_updates = state["num_updates"]
        for name, weight in self.weights.items():
            weight.copy_(state["weights"][name])


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes beside and renames, so that an interruption leaves the last good checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def require(path: Path) -> None:
    """Raises `InputError` where an earlier stage has not been run."""
    if not path.exists():
        raise InputError(f"{path} is not there: run the stage that makes it first (jobs/train_emoji.py --help)")


def load_checkpoint(path: Path) -> dict[str, Any]:
    require(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def append_log(path: Path, record: dict[str, Any]) -> None:
    """One JSON line, and the same to the logger."""
    line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()})
    logger.info("%s", line)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def save_sheet(path: Path, images: Tensor, columns: int) -> None:
    """Images `(N, 3, H, W)` in [-1, 1] as one PNG, row by row, 2 pixels apart."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 2), columns * (width + 2), 3), 255, np.uint8)
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for i, image in enumerate(pixels):
        top, left = i // columns * (height + 2), i % columns * (width + 2)
        sheet[top : top + height, left : left + width] = image
    Image.fromarray(sheet).save(path)
