"""Speed by the clock: seconds an image under every policy, alone and in full batches, probe and decoding included."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from skipvar.config import RunConfig
from skipvar.types import Request

if TYPE_CHECKING:
    from skipvar.engine.engine import Engine
    from skipvar.engine.resolved import Resolved
    from skipvar.model.pipeline import Pipeline

Build = Callable[[RunConfig, "Resolved | None", "Pipeline | None"], "Engine"]
"""As `skipvar.local.build_local_engine`."""
ONE, FULL = "one", "full"


@dataclass(frozen=True)
class Speed:
    """Seconds an image, the median over the rounds."""

    one: float
    """At a batch of 1."""
    full: float
    """In the configuration's batches."""


def measure_speeds(
    config: RunConfig, policies: Mapping[str, str], requests: Sequence[Request], num_rounds: int, build: Build
) -> dict[str, Speed]:
    """By the names of `policies` (name to what `config.policy` takes). All are timed in every round, one after the
    other, so that a busy moment of the machine strikes them alike; what is set up once is not timed."""
    model: Pipeline | None = None  # loaded by the first engine, for all
    single = replace(config, engine=replace(config.engine, batch_size=1))
    engines: dict[tuple[str, str], Any] = {}
    for name, policy in policies.items():
        for kind, base in ((ONE, single), (FULL, config)):
            engines[name, kind] = build(replace(base, policy=policy), None, model)
            model = engines[name, kind].pipeline
            _run(engines[name, kind], requests[:1])
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in engines}
    for _ in range(num_rounds):
        for key, engine in engines.items():
            seconds[key].append(_run(engine, requests))
    found = {key: statistics.median(values) / len(requests) for key, values in seconds.items()}
    return {name: Speed(one=found[name, ONE], full=found[name, FULL]) for name in policies}


def _run(engine: "Engine", requests: Sequence[Request]) -> float:
    started = time.perf_counter()
    engine.submit(requests)
    engine.drain()
    return time.perf_counter() - started
