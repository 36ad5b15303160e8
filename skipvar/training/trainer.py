"""What both trainings share: the loop, its learning rates, the average of the weights."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skipvar.training.common import Folders, checkpoint_path, load_checkpoint, load_weights, save_checkpoint, telling
from skipvar.training.muon import Optimizer
from skipvar.training.parallel import Peers, run_peers
from skipvar.training.recipe import RateSchedule, Recipe, TransformerRecipe, VaeRecipe

logger = logging.getLogger(__name__)


class Trainer(ABC):
    """A network on its way: weights, their average, optimizer, step."""

    stage: str
    """`vae` or `transformer`."""

    def __init__(
        self, recipe: Recipe, settings: VaeRecipe | TransformerRecipe, model: nn.Module, folders: Folders, peers: Peers
    ) -> None:
        self.recipe, self.folders, self.peers = recipe, folders, peers
        self.schedule = settings.schedule
        self.model = model.to(peers.device)
        self.ema = Ema(self.model, settings.ema_decay)
        self.optimizer = self.make_optimizer()
        self.step = 0
        self.first_cold_step = 0
        """Where the optimizer's moments started from nothing."""

    @abstractmethod
    def make_optimizer(self) -> Optimizer:
        """A fresh one, of all that is trained at this step."""

    @abstractmethod
    def loss(self, generator: torch.Generator) -> Tensor:
        """The loss, with gradient, of a batch that is drawn by `generator` alone."""

    @abstractmethod
    def report(self) -> None:
        """Logs the losses since the last report (the VAE also its PSNR); the leading process alone calls it."""

    def reach_step(self, step: int) -> None:
        """Counts a step that was trained or restored; where something changes with it, it changes here."""
        self.step = step

    def train(self, minutes: float) -> None:
        """Trains up to the schedule's last step, or for `minutes`; the same command again goes on from there.

        With the same number of processes and the same precision an interruption changes nothing: what a step does
        depends on its number and what was saved.
        """
        self.restore()
        is_over = self.step >= self.schedule.num_steps
        if is_over:
            logger.info("step %d of %d: nothing left to train", self.step, self.schedule.num_steps)
        end, last_saved = time.monotonic() + 60 * minutes, time.monotonic()
        while not is_over:
            self.train_step(rate_factor(self.schedule, self.step, self.first_cold_step))
            is_over = self.step >= self.schedule.num_steps or self.peers.hear_leader(end - time.monotonic()) <= 0
            is_due = is_over or time.monotonic() - last_saved > self.recipe.checkpoint_seconds
            if self.peers.is_leader and is_due:
                self.report()
                self.save()
                last_saved = time.monotonic()

    def train_step(self, factor: float) -> None:
        """One step at `factor` of the learning rates."""
        self.loss(self.peers.generator(self.recipe.seed, self.step)).backward()
        self.peers.average(self.optimizer.parameters)
        self.optimizer.step(factor)
        self.ema.update()
        self.reach_step(self.step + 1)

    def save(self) -> None:
        """Writes the run's checkpoint; the leading process alone calls it."""
        save_checkpoint(self.folders.run, self.stage, self.state_dict())

    def restore(self) -> None:
        """Goes on from the run's checkpoint, if there is one. Raises `InputError` for one of another network."""
        path = checkpoint_path(self.folders.run, self.stage)
        if not path.exists():
            return
        state = load_checkpoint(self.folders.run, self.stage)
        with telling(path, "move it away to begin anew"):
            self.load_state_dict(state)
        logger.info("going on from step %d", self.step)

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs; no copies."""
        return {
            "model": dict(self.model.named_parameters()),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "step": self.step,
            "first_cold_step": self.first_cold_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave, or `start.restore` made up."""
        load_weights(self.model, state["model"])
        self.ema.load_state_dict(state["ema"])
        self.first_cold_step = state["first_cold_step"]
        self.reach_step(state["step"])
        if self.first_cold_step < self.step:  # else its moments are yet to come
            self.optimizer.load_state_dict(state["optimizer"])


def train(make: Callable[[Peers], Trainer], minutes: float, num_processes: int) -> None:
    """Trains what `make` (picklable) gives each process to the end of its schedule, or for `minutes`."""
    run_peers(num_processes, partial(_train, make, minutes))


def _train(make: Callable[[Peers], Trainer], minutes: float, peers: Peers) -> None:
    make(peers).train(minutes)


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
