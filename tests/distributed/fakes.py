"""An engine and a writer without a model, for what must be injected: deaths, failures, slowness."""

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from skipvar.config import RunConfig
from skipvar.distributed.messages import Assignment
from skipvar.engine.resolved import DeviceReport
from skipvar.engine.statistics import EngineStatistics
from skipvar.errors import ModelError
from skipvar.types import Failure, Image, Request, UnitReport

STRATEGIES = ("base", "skip_1", "skip_2", "uncond_1")


class FakeEngine:
    """Batches of `batch_size` per strategy, as the real one: full buckets run, others only with `flush`.

    A prompt that says `die` kills the process, `fail` becomes a failure, `raise` breaks the engine.
    """

    def __init__(self, batch_size: int = 4, step_seconds: float = 0.0) -> None:
        self.batch_size = batch_size
        self.step_seconds = step_seconds
        self.buckets: dict[str, list[Request]] = {name: [] for name in STRATEGIES}
        self.fills: list[int] = []
        self.statistics = EngineStatistics()

    @property
    def num_pending(self) -> int:
        return sum(len(bucket) for bucket in self.buckets.values())

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            digest = hashlib.sha256(str(request.key).encode()).digest()
            self.buckets[STRATEGIES[digest[0] % len(STRATEGIES)]].append(request)

    def can_step(self, flush: bool = False) -> bool:
        return any(len(bucket) >= (1 if flush else self.batch_size) for bucket in self.buckets.values())

    def step(self, flush: bool = False) -> list[Image | Failure]:
        time.sleep(self.step_seconds)
        self.statistics.seconds["suffix"] += self.step_seconds
        name, bucket = max(self.buckets.items(), key=lambda item: len(item[1]))
        assert flush or len(bucket) >= self.batch_size
        batch, self.buckets[name] = bucket[: self.batch_size], bucket[self.batch_size :]
        self.fills.append(len(batch))
        return [self._make(request, "base" if request.must_be_base else name) for request in batch]

    @property
    def report(self) -> DeviceReport:
        return DeviceReport(
            processor="fake", torch="0", batch_size={}, pool_images=4 * self.batch_size, self_check=None
        )

    def _make(self, request: Request, strategy: str) -> Image | Failure:
        if "die" in request.prompt:
            os._exit(1)
        if "raise" in request.prompt:
            raise RuntimeError("the device fell off")
        if "fail" in request.prompt:
            return Failure.of(request, ValueError("asked to fail"))
        return Image(
            request=request,
            pixels=np.full((8, 8, 3), request.position % 256, np.uint8),
            strategy=strategy,
            probe=None,
            strategy_scores=None,
            scales_run=3,
            cost_share=1.0,
            engine_seconds=0.01,
        )


class FakeWriter:
    """Keeps what it gets; says what it published."""

    def __init__(self, assignment: Assignment, published: dict[int, list[Image | Failure]]) -> None:
        self.assignment = assignment
        self.items: list[Image | Failure] = []
        self.published = published

    def add(self, item: Image | Failure) -> None:
        self.items.append(item)

    def publish(self) -> UnitReport:
        index = self.assignment.unit.index
        assert index not in self.published
        self.published[index] = self.items
        images = [item for item in self.items if isinstance(item, Image)]
        strategies = {name: sum(image.strategy == name for image in images) for name in STRATEGIES}
        return UnitReport(
            unit=index,
            num_images=len(images),
            num_failures=len(self.items) - len(images),
            same_content=True,
            strategies=strategies,
        )


def make_request(position: int, prompt: str = "a cat") -> Request:
    return Request(
        position=position,
        image_index=0,
        id=str(position),
        prompt=prompt,
        negative_prompt=None,
        seed=position,
        cfg=(3.0,) * 3,
        tau=(0.5,) * 3,
        top_k=900,
        top_p=0.97,
        aspect_ratio=1.0,
    )


def build_fake_engine(config: RunConfig, resolved: object) -> FakeEngine:
    """The engine factory for tests. It leaves the replica's process number beside the input."""
    (Path(config.input.path).parent / "process").write_text(str(os.getpid()))
    return FakeEngine()


def build_slow_engine(config: RunConfig, resolved: object) -> FakeEngine:
    build_fake_engine(config, resolved)
    return FakeEngine(step_seconds=0.1)


class ForgivingEngine(FakeEngine):
    """Makes what the others fail."""

    def _make(self, request: Request, strategy: str) -> Image | Failure:
        return super()._make(replace(request, prompt="x"), strategy)


def build_forgiving_engine(config: object, resolved: object) -> FakeEngine:
    return ForgivingEngine()


def build_no_engine(config: object, resolved: object) -> FakeEngine:
    raise ModelError("model.path: no weights there.")


def build_dying_engine(config: object, resolved: object) -> FakeEngine:
    os._exit(1)


class DriftedEngine(FakeEngine):
    """Audits every image that the policy decided; none is like `base`."""

    def _make(self, request: Request, strategy: str) -> Image | Failure:
        made = super()._make(request, strategy)
        return made if request.must_be_base or isinstance(made, Failure) else replace(made, audit_ssim=0.5)


def build_drifted_engine(config: object, resolved: object) -> FakeEngine:
    return DriftedEngine(step_seconds=0.1)
