"""What a run would be: prompts, units, cost of each strategy, time by a short measured warm-up. Writes nothing."""

import itertools
import os
import time

import torch

from skipvar.checks import message_of
from skipvar.config import BudgetConfig, RunConfig
from skipvar.distributed.opening import look_at_output, prepare, settle
from skipvar.engine.resolved import strategy_costs
from skipvar.local import build_local_engine
from skipvar.shards.prompts import read_unit
from skipvar.types import Failure, Request

WARM_UP_IMAGES = 16


def estimate(config: RunConfig) -> str:
    """A few lines for a person. Raises `SkipvarError` for what the run itself would refuse at start."""
    config = settle(config)
    look_at_output(config)
    resolved, plan = prepare(config)
    costs = strategy_costs(resolved, config.sampling.aspect_ratio)
    items = list(itertools.islice(read_unit(plan.unit(0), plan.spec), WARM_UP_IMAGES))
    requests = [item for item in items if isinstance(item, Request)]
    failures = [item for item in items if isinstance(item, Failure)]
    head = [
        f"prompts: {plan.identity.num_rows}, images: {plan.identity.num_requests}, units: {plan.num_units}",
        f"policy: {resolved.policy.name}",
    ]
    if failures:
        share = "all" if not requests else str(len(failures))
        first = message_of(failures[0].message)
        head.append(f"error rows: {share} of the first {len(items)} requests; the first: {first}")
    if not requests:
        return "\n".join([*head, "no time is estimated, since no row of the sample can be used"])
    engine = build_local_engine(config, resolved)
    engine.submit(requests[:1])
    engine.drain()  # the first image pays for what is set up once
    started = time.perf_counter()
    engine.submit(requests)
    engine.drain()
    seconds = (time.perf_counter() - started) / len(requests)
    num_replicas = _num_replicas(config, plan.num_units, device=resolved.device)
    lines = [
        *head,
        "token-forwards an image (share of base):",
        *(f"  {name:9} {cost:>9,} ({cost / costs['base']:.0%})" for name, cost in costs.items()),
        f"one replica: {1 / seconds:.2f} images/s, measured on {len(requests)} images",
        f"estimated time with {num_replicas} replicas: {_hours(plan.identity.num_requests * seconds / num_replicas)}",
    ]
    lines += cost_lines(config.budget, plan.identity.num_requests, seconds)
    return "\n".join(lines)


def cost_lines(budget: BudgetConfig, num_images: int, seconds_per_image: float) -> list[str]:
    """What the whole input costs, where a price is known: replica time is paid, however many share it."""
    price = budget.usd_per_replica_hour
    if price is None:
        return ["cost: unknown; give budget.usd_per_replica_hour"]
    each = seconds_per_image / 3600 * price
    line = f"cost of the whole input: {num_images * each:.2f} USD, {each:.2g} an image, at {price:g} USD a replica hour"
    over = budget.max_usd is not None and num_images * each > budget.max_usd
    return [line + (f": more than budget.max_usd ({budget.max_usd:g}), where it will stop" if over else "")]


def _num_replicas(config: RunConfig, num_units: int, *, device: str) -> int:
    """Replicas that this machine would run; a cluster's size is not known before it is joined."""
    most = config.cluster.replicas.max
    if most == "auto":
        most = (
            torch.cuda.device_count()
            if device == "cuda"
            else len(os.sched_getaffinity(0)) // config.cluster.cpus_per_replica
        )
    return max(1, min(int(most), num_units))


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
