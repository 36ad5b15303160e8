"""What a run would be: prompts, units, cost of each strategy, time by a short measured warm-up. Writes nothing."""

import itertools
import os
import time
from dataclasses import replace

import torch

from skipvar.config import RunConfig
from skipvar.distributed.opening import plan_for_model
from skipvar.distributed.replica import build_real_engine
from skipvar.engine.build import estimate_cost
from skipvar.shards.prompts import plan_input, read_unit
from skipvar.types import Request

WARM_UP_IMAGES = 16


def estimate(config: RunConfig) -> str:
    """A few lines for a person. Raises `SkipvarError` for what the run itself would refuse at start."""
    plan = plan_input(config)
    costs = estimate_cost(config)["token_forwards"]
    is_cuda = config.model.device == "cuda" or (config.model.device == "auto" and torch.cuda.is_available())
    engine = build_real_engine(replace(config, model=replace(config.model, device="cuda" if is_cuda else "cpu")))
    plan = plan_for_model(plan, config, engine.describe())
    items = itertools.islice(read_unit(plan.unit(0), plan.spec), WARM_UP_IMAGES)
    requests = [item for item in items if isinstance(item, Request)]
    engine.submit(requests[:1])
    engine.drain()  # the first image pays for what is set up once
    started = time.perf_counter()
    engine.submit(requests)
    engine.drain()
    seconds = (time.perf_counter() - started) / max(1, len(requests))
    num_replicas = _num_replicas(config, plan.num_units, is_cuda=is_cuda)
    lines = [
        f"prompts: {plan.num_rows}, images: {plan.num_requests}, units: {plan.num_units}",
        f"policy: {engine.describe()['policy']}",
        "token-forwards an image (share of base):",
        *(f"  {name:9} {cost:>9,} ({cost / costs['base']:.0%})" for name, cost in costs.items()),
        f"one replica: {1 / seconds:.2f} images/s, measured on {len(requests)} images",
        f"estimated time with {num_replicas} replicas: {_hours(plan.num_requests * seconds / num_replicas)}",
    ]
    return "\n".join(lines)


def _num_replicas(config: RunConfig, num_units: int, *, is_cuda: bool) -> int:
    """Replicas that this machine would run; a cluster's size is not known before it is joined."""
    most = config.cluster.replicas.max
    if most == "auto":
        most = torch.cuda.device_count() if is_cuda else len(os.sched_getaffinity(0)) // config.cluster.cpus_per_replica
    return max(1, min(int(most), num_units))


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
