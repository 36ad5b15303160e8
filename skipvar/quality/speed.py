"""Speed by the clock: seconds an image under every policy, alone and in full batches, probe and decoding included."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from skipvar.config import RunConfig
from skipvar.engine.resolved import Resolved, resolve
from skipvar.model import allocator
from skipvar.shards.cache import StoredFiles
from skipvar.types import Request

if TYPE_CHECKING:
    from skipvar.engine.engine import Engine
    from skipvar.model.pipeline import Pipeline

Build = Callable[[RunConfig, Resolved, "Pipeline | None"], "Engine"]
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
    other, so that a busy moment of the machine strikes them alike; what is set up once is not timed. There is one
    engine at a time: on a GPU each plans with all the memory that the model leaves.
    """
    files = StoredFiles(config.storage)
    resolved = {name: resolve(replace(config, policy=policy), files) for name, policy in policies.items()}
    model: Pipeline | None = None  # loaded by the first engine, for all
    seconds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(num_rounds):
        for name, policy in policies.items():
            for kind, batch_size in ((ONE, 1), (FULL, resolved[name].batch_size)):
                of_kind = replace(resolved[name], batch_size=batch_size)
                engine = build(replace(config, policy=policy), of_kind, model)
                model = engine.pipeline
                _run(engine, requests[:1])
                seconds[name, kind].append(_run(engine, requests))
                del engine
                allocator.give_back()
    found = {key: statistics.median(values) / len(requests) for key, values in seconds.items()}
    return {name: Speed(one=found[name, ONE], full=found[name, FULL]) for name in policies}


def _run(engine: "Engine", requests: Sequence[Request]) -> float:
    started = time.perf_counter()
    engine.submit(requests)
    engine.drain()
    return time.perf_counter() - started
