"""Opening a run: where its output is, what its fingerprint is made of, which units are left. No Ray."""

import dataclasses
import logging
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from skipvar.config import RunConfig, StorageConfig, to_dict
from skipvar.shards.lease import Lease, acquire
from skipvar.shards.ledger import Ledger, fingerprint
from skipvar.shards.prompts import Plan, plan_input
from skipvar.shards.rows import InputSpec
from skipvar.shards.storage import Storage, open_storage
from skipvar.shards.writer import DatasetSpec
from skipvar.types import Unit

logger = logging.getLogger(__name__)

FINGERPRINT_FIELD = "{fingerprint}"
BYTES_PER_PIXEL = 3
START_PATIENCE_SECONDS = 30.0
"""How long a lost endpoint is retried before any work is done: most likely its address is wrong."""
MIN_UNITS_AHEAD = 2
POOLS_AHEAD = 4
"""A replica asks for more while it has fewer requests than this many pools of waiting images."""
OPEN_FACTOR = 4
"""Unpublished requests a replica may hold, in multiples of what it asks for."""


@dataclass(frozen=True, kw_only=True)
class WorkOrder:
    """What a replica needs to know of the run besides its units; the same for all replicas, and small."""

    input: InputSpec
    dataset: DatasetSpec
    session: str
    """Names the logs."""
    wanted_requests: int
    max_open_requests: int


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A run that this process holds the lease of."""

    storage: Storage
    ledger: Ledger
    lease: Lease
    plan: Plan
    dataset: DatasetSpec
    units: Iterator[Unit]
    """Those still to be made, one at a time: never all in memory."""
    num_units: int
    num_requests: int
    """Requests of those units."""
    is_resumed: bool

    description: dict[str, Any]
    """The first replica's: what was resolved for the whole run."""
    session: str
    """When this process began to work on the run, UTC: names its logs."""

    @property
    def unit_requests(self) -> int:
        """Requests of a full unit."""
        return self.plan.prompts_per_unit * self.plan.images_per_prompt

    def order(self) -> WorkOrder:
        """How much a replica takes on at a time: enough that its engine always has images to mix."""
        wanted = max(MIN_UNITS_AHEAD * self.unit_requests, POOLS_AHEAD * self.description["pool_images"])
        return WorkOrder(
            input=self.plan.spec,
            dataset=self.dataset,
            session=self.session,
            wanted_requests=wanted,
            max_open_requests=OPEN_FACTOR * wanted,
        )

    def with_patience(self, config: StorageConfig) -> "OpenRun":
        """The same run, its output reached with other settings."""
        storage = open_storage(self.storage.uri, config)
        return replace(self, storage=storage, ledger=Ledger(storage))


def locate(config: RunConfig) -> RunConfig:
    """The configuration with `{date}` filled in."""
    path = config.output.path.replace("{date}", datetime.now(UTC).strftime("%Y-%m-%d"))
    return replace(config, output=replace(config.output, path=path))


def plan_soon(config: RunConfig) -> Plan:
    """The plan of the input; a mistyped endpoint is told after half a minute, not after `storage.retry_seconds`."""
    plan = plan_input(replace(config, storage=_hurried(config.storage)))
    return replace(plan, spec=replace(plan.spec, storage=config.storage))


def _hurried(config: StorageConfig) -> StorageConfig:
    return replace(config, retry_seconds=min(config.retry_seconds, START_PATIENCE_SECONDS))


def recall(config: RunConfig) -> RunConfig:
    """For a run that is there already: the configuration with `auto` values as they were resolved then.

    Where the location depends on the fingerprint nothing can be recalled: another machine then starts a run of its own.
    """
    if FINGERPRINT_FIELD in config.output.path or config.model.dtype != "auto":
        return config
    record = Ledger(open_storage(config.output.path, _hurried(config.storage))).read_run()
    dtype = (record or {}).get("resolved", {}).get("dtype")
    return replace(config, model=replace(config.model, dtype=dtype)) if dtype else config


def plan_for_model(plan: Plan, config: RunConfig, description: dict[str, Any]) -> Plan:
    """The plan, once the number of scales and the images' size are known; made anew where these change it."""
    num_scales, pixels = description["num_scales"], description["max_image_pixels"]
    unit_bytes = plan.prompts_per_unit * plan.images_per_prompt * pixels * BYTES_PER_PIXEL
    has_lists = isinstance(config.sampling.cfg, list) or isinstance(config.sampling.tau, list)
    if unit_bytes > config.output.max_file_bytes or has_lists:
        return plan_input(config, num_scales, pixels)
    return replace(plan, spec=replace(plan.spec, num_scales=num_scales))


def fingerprint_parts(config: RunConfig, plan: Plan, description: dict[str, Any]) -> dict[str, Any]:
    """All that changes pixels or rows, by the names that a refusal to resume shows the user."""
    sampling = dataclasses.asdict(config.sampling) | {"size": description["size"]}
    engine: dict[str, Any] = {
        "batch_invariant": config.engine.batch_invariant,
        "fixed_shapes": config.engine.fixed_shapes,
    }
    if config.engine.fixed_shapes:
        engine["batch_size"] = description["batch_size"]
    return {
        "model": {
            "name": description["model"],
            "config_sha256": description["model_config_sha256"],
            "weights_sha256": description["weights_sha256"],
            "dtype": description["dtype"],
        },
        "sampling": sampling,
        "policy": {"name": description["policy"], "sha256": description["policy_sha256"]},
        "engine": engine,
        "output": {"image_format": config.output.image_format, "unit_rows": config.output.unit_rows},
        "columns": {"prompt": config.input.prompt_column, "id": config.input.id_column, "limit": config.input.limit},
        "input": plan.identity,
    }


def open_run(
    config: RunConfig, plan: Plan, description: dict[str, Any], sleep: Callable[[float], None] = time.sleep
) -> OpenRun:
    """Take the output's lease (waiting by `sleep`), begin or resume its run, and list what is left.

    Raises `LeaseHeldError` while another run is at work there, `ConfigError` where the run there was made otherwise.
    """
    parts = fingerprint_parts(config, plan, description)
    output = config.output.path.replace(FINGERPRINT_FIELD, fingerprint(parts))
    storage = open_storage(output, config.storage)
    storage.probe()
    lease = acquire(storage, config.storage.lease_stale_seconds, sleep)
    try:
        ledger = Ledger(storage)
        run = ledger.open_run(parts, to_dict(config), _versions(), plan.identity, description)
        units, num_units, num_requests = _units_left(ledger, plan, retry_errors=config.retry_errors)
    except BaseException:
        lease.release()
        raise
    logger.info("%s run %s in %s: %d of %d units to do", "Resuming" if run.is_resumed else "New", run.fingerprint,
                storage.uri, num_units, plan.num_units)  # fmt: skip
    return OpenRun(
        storage=storage,
        ledger=ledger,
        lease=lease,
        plan=plan,
        dataset=DatasetSpec.of(
            config, plan.columns, output=storage.uri, fingerprint=run.fingerprint, policy=description["policy"]
        ),
        units=units,
        num_units=num_units,
        num_requests=num_requests,
        is_resumed=run.is_resumed,
        description=description,
        session=datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ"),
    )


def _units_left(ledger: Ledger, plan: Plan, *, retry_errors: bool) -> tuple[Iterator[Unit], int, int]:
    """The units to make, their number, and that of their requests."""
    if retry_errors:
        retries = list(ledger.retry_units(plan))
        return iter(retries), len(retries), sum(len(unit.only or ()) for unit in retries)
    is_done = bytearray(plan.num_units)  # a byte a unit: the listing itself is let go
    for index in ledger.done_units():
        if index < len(is_done):
            is_done[index] = 1
    num_left = is_done.count(0)
    per_unit = plan.prompts_per_unit * plan.images_per_prompt
    num_requests = num_left * per_unit
    if num_left and not is_done[-1]:  # the last unit may be shorter
        num_requests -= plan.num_units * per_unit - plan.num_requests
    return (plan.unit(index) for index, done in enumerate(is_done) if not done), num_left, num_requests


def _versions() -> dict[str, str]:
    names = ("skipvar", "torch", "numpy", "ray", "pyarrow", "pillow", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
