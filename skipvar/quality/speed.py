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
from skipvar.shards.prompts import plan_input, read_unit
from skipvar.types import Request

if TYPE_CHECKING:
    from skipvar.engine.engine import Engine
    from skipvar.model.pipeline import Pipeline

Build = Callable[[RunConfig, Resolved, "Pipeline | None"], "Engine"]
"""As `skipvar.local.build_local_engine`."""


@dataclass(frozen=True)
class Speed:
    """Of one policy; seconds an image are the median over the rounds."""

    seconds_one: float
    """At a batch of 1."""
    seconds: float
    """In the configuration's batches."""
    speedup_one: float
    """How many times faster than `base`, at a batch of 1."""
    speedup: float


def spread_requests(config: RunConfig, num_scales: int, count: int) -> list[Request]:
    """Some of the input's requests, spread over all of it: what the clock runs on."""
    plan = plan_input(config, num_scales)
    items = (item for unit in range(plan.num_units) for item in read_unit(plan.unit(unit), plan.spec))
    found = [item for item in items if isinstance(item, Request)]
    return found[:: max(1, len(found) // count)][:count]


def measure_speeds(
    config: RunConfig, policies: Mapping[str, str], requests: Sequence[Request], num_rounds: int, build: Build
) -> dict[str, Speed]:
    """By the names of `policies` (name to what `config.policy` takes), `base` among them.

    All are timed in every round, one after the other, so that a busy moment of the machine strikes them alike; what is
    set up once is not timed. There is one engine at a time: on a GPU each plans with all the memory that the model
    leaves.
    """
    files = StoredFiles(config.storage)
    resolved = {name: resolve(replace(config, policy=policy), files) for name, policy in policies.items()}
    model: Pipeline | None = None  # loaded by the first engine, for all
    one, full = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    for _ in range(num_rounds):
        for name, policy in policies.items():
            for seconds, batch_size in ((one, 1), (full, resolved[name].batch_size)):
                of_size = replace(resolved[name], batch_size=batch_size)
                engine = build(replace(config, policy=policy), of_size, model)
                model = engine.pipeline
                _run(engine, requests[:1])
                seconds[name].append(_run(engine, requests) / len(requests))
                del engine
                allocator.give_back()
    medians = {name: (statistics.median(one[name]), statistics.median(full[name])) for name in policies}
    base_one, base_full = medians["base"]
    return {
        name: Speed(alone, batched, round(base_one / alone, 3), round(base_full / batched, 3))
        for name, (alone, batched) in medians.items()
    }


def _run(engine: "Engine", requests: Sequence[Request]) -> float:
    started = time.perf_counter()
    engine.submit(requests)
    engine.drain()
    return time.perf_counter() - started
