"""One image on its way: all that it needs to go on in any batch, but for keys and values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipvar.model.schedules import Schedule
from skipvar.model.transformer import TextState
from skipvar.skip.strategy import Strategy, make_strategy
from skipvar.types import Image, Probe, Request


@dataclass(frozen=True)
class Snapshot:
    """An image's state at one moment. Tensors are shared, not copied: nothing changes them in place."""

    random_state: Tensor
    """State of the image's generator."""
    fields: Mapping[str, Any]
    """All of the image's, by name."""


@dataclass(eq=False)
class ImageState:
    """A request that is being made."""

    request: Request
    schedule: Schedule
    generator: torch.Generator
    text: tuple[TextState, ...] = ()
    """Of one row each: conditional, then unconditional where the image is guided. Empty before its text is encoded."""
    code_sum: Tensor | None = None
    """`(dv, h, w)` float32; None before the first scale."""
    is_finite: bool = True
    """False once a logit was not a number: the image is worthless."""
    slot: int | None = None
    """Where its keys and values wait, after the decision."""
    probe: Probe | None = None
    strategy: Strategy | None = None
    scores: Mapping[str, float] | None = None
    at_decision: Snapshot | None = None
    """Where an image that is to be audited goes back to, once it is made as decided."""
    made: Image | None = None
    """As it was decided, while it is made under `base` as well; of a trial, once all is done."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Its share of the engine's time, by phase."""

    @property
    def is_guided(self) -> bool:
        return any(cfg != 1 for cfg in self.request.cfg)

    @property
    def is_base(self) -> bool:
        return self.strategy is not None and self.strategy.name == "base"

    def snapshot(self) -> Snapshot:
        """What `restore` needs to bring the image back to this moment."""
        return Snapshot(self.generator.get_state(), dict(vars(self)))

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot of this image; the seconds spent since then stay counted (one mapping throughout)."""
        self.generator.set_state(snapshot.random_state)
        vars(self).update(snapshot.fields)

    def token_forwards(self) -> tuple[int, int]:
        """Tokens that go through the transformer, both branches counted: under its strategy, and under `base`."""
        assert self.strategy is not None
        tokens, base = self.schedule.num_tokens, make_strategy("base", self.schedule.num_scales)
        run, full = (strategy.token_forwards(tokens, guided=self.is_guided) for strategy in (self.strategy, base))
        return run, full

    def finish(self, pixels: np.ndarray) -> Image:
        """The result, once all scales have run; `pixels: (H, W, 3)` uint8."""
        assert self.strategy is not None
        run, base = self.token_forwards()
        return Image(
            request=self.request,
            pixels=pixels,
            strategy=self.strategy.name,
            probe=self.probe,
            strategy_scores=self.scores,
            scales_run=self.strategy.num_scales_run,
            cost_share=run / base,
            engine_seconds=sum(self.seconds.values()),
            phase_seconds=dict(self.seconds),
        )
