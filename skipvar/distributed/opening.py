"""Opening a run: where its output is, what its fingerprint is made of, which units are left. No Ray."""

import logging
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from skipvar.config import RunConfig, StorageConfig
from skipvar.distributed.environment import resolve_paths
from skipvar.engine.resolved import Resolved, resolve
from skipvar.model.device import Device
from skipvar.shards.cache import StoredFiles
from skipvar.shards.lease import Lease, acquire
from skipvar.shards.ledger import Ledger
from skipvar.shards.prompts import Plan, PublishedInput, find_published, plan_input, publish_input
from skipvar.shards.record import FINGERPRINT_DIGITS, RunRecord, fingerprint, now
from skipvar.shards.rows import InputSpec
from skipvar.shards.schema import SCHEMA_VERSION
from skipvar.shards.storage import Storage, open_storage, split_s3
from skipvar.shards.writer import DatasetSpec
from skipvar.types import Unit

logger = logging.getLogger(__name__)

FINGERPRINT_FIELD = "{fingerprint}"
START_PATIENCE_SECONDS = 30.0
MIN_UNITS_AHEAD = 2
POOLS_AHEAD = 4
"""A replica asks for more while it has fewer requests than this many pools of waiting images."""


@dataclass(frozen=True, kw_only=True)
class WorkOrder:
    """What a replica needs to know of the run besides its units; the same for all replicas, and small."""

    input: InputSpec
    dataset: DatasetSpec
    session: str
    """When the driver began to work on the run, UTC: names the logs."""
    unit_requests: int
    """Requests of a full unit."""

    def wanted_requests(self, pool_images: int) -> int:
        """Requests that an engine with so large a pool should have in hand, so that it always has images to mix."""
        return max(MIN_UNITS_AHEAD * self.unit_requests, POOLS_AHEAD * pool_images)


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A run that this process holds the lease of."""

    storage: Storage
    lease: Lease
    plan: Plan
    order: WorkOrder
    units: Iterator[Unit]
    """Those still to be made, one at a time: never all in memory, but for retries, with the keys of what failed."""
    num_units: int
    num_requests: int
    """Requests of those units."""
    resolved: Resolved
    record: RunRecord
    """As it was when the run was opened: a resumed one's tells of earlier sessions."""
    found: RunRecord | None
    """What stood there before; None: the run is new."""

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.storage)

    @property
    def unit_requests(self) -> int:
        """Requests of a full unit."""
        return self.order.unit_requests

    def with_patience(self, seconds: float) -> "OpenRun":
        """The same run, with no more patience than this for its output."""
        return replace(self, storage=open_storage(self.storage.uri, with_patience(self.order.dataset.storage, seconds)))

    def withdraw(self) -> None:
        """Leave the output as it was found: that of a new run is free for the right configuration."""
        if not self.lease.is_over:
            self.ledger.withdraw(self.found)


def with_patience(storage: StorageConfig, seconds: float) -> StorageConfig:
    """The same store, retried for so long at most."""
    return replace(storage, retry_seconds=min(storage.retry_seconds, seconds))


def open_writable(uri: str, config: StorageConfig) -> Storage:
    """The storage at `uri`, which has shown that it can be written to. Raises `StorageError` where it cannot."""
    open_storage(uri, with_patience(config, START_PATIENCE_SECONDS)).check_writable()
    return open_storage(uri, config)


def settle(config: RunConfig) -> RunConfig:
    """The configuration with `{date}` filled in and local paths absolute; the store that it uses has answered."""
    path = config.output.path.replace("{date}", datetime.now(UTC).strftime("%Y-%m-%d"))
    config = resolve_paths(replace(config, output=replace(config.output, path=path)))
    check_store_answers(config)
    return config


def check_store_answers(config: RunConfig) -> None:
    """Ask the store that the run uses for a sign of life, before any work.

    A mistyped endpoint is told after half a minute, not after `storage.retry_seconds`.
    """
    inputs = config.input.path if isinstance(config.input.path, list) else [config.input.path]
    model = config.model
    asked = [config.output.path, *inputs, config.policy, model.path, model.vae_path, model.text_encoder_path,
             config.audit.state]  # fmt: skip
    uri = next((uri for uri in asked if uri is not None and uri.startswith("s3://")), None)
    if uri is not None:
        bucket, key = split_s3(uri)
        storage = open_storage(f"s3://{bucket}", with_patience(config.storage, START_PATIENCE_SECONDS))
        next(storage.list(re.split(r"[{*?[]", key)[0]), None)


def look_at_output(config: RunConfig) -> None:
    """Raise where it is plain that the output cannot be written, before anything is planned. Writes nothing."""
    output = config.output.path.replace(FINGERPRINT_FIELD, "0" * FINGERPRINT_DIGITS)
    open_storage(output, with_patience(config.storage, START_PATIENCE_SECONDS)).look()


def known_input(config: RunConfig) -> PublishedInput | None:
    """The text input that a run in this output published: unless it changed, it is not brought into its form again."""
    if FINGERPRINT_FIELD in config.output.path:
        return None
    storage = open_storage(config.output.path, config.storage)
    record = Ledger(storage).read_run()
    return None if record is None else find_published(storage, record.input.files)


def fingerprint_parts(config: RunConfig, resolved: Resolved, plan: Plan) -> dict[str, Any]:
    """All that changes pixels or rows, by the names that a refusal to resume shows the user."""
    return {
        **resolved.fingerprint_parts(),
        "sampling": asdict(config.sampling) | {"size": resolved.size},
        "output": {"image_format": config.output.image_format, "unit_rows": config.output.unit_rows},
        "columns": {"prompt": config.input.prompt_column, "id": config.input.id_column, "limit": config.input.limit},
        "input": asdict(plan.identity),
        **({"audit": {"fraction": config.audit.fraction}} if config.audit.fraction else {}),  # a row tells its SSIM
    }


def prepare(
    config: RunConfig, device: Device | None = None, published: PublishedInput | None = None
) -> tuple[Resolved, Plan]:
    """All that was `auto` or must be looked up, on that device (None: this machine's), and the input as units."""
    resolved = resolve(config, StoredFiles(config.storage), device)
    return resolved, plan_input(config, resolved.num_scales, resolved.max_image_pixels, published)


def open_run(
    config: RunConfig,
    device: Device,
    sleep: Callable[[float], None] = time.sleep,
    check: Callable[[Plan], None] | None = None,
) -> OpenRun:
    """Resolve and plan (`check` may refuse the plan), take the output's lease (waiting by `sleep`), begin or resume its
    run, and list what is left.

    Raises `LeaseHeldError` while another run is at work there, `ConfigError` where the run there was made otherwise.
    """
    resolved, plan = prepare(config, device, known_input(config))
    if check is not None:
        check(plan)
    parts = fingerprint_parts(config, resolved, plan)
    run_fingerprint = fingerprint(parts)
    storage = open_writable(config.output.path.replace(FINGERPRINT_FIELD, run_fingerprint), config.storage)
    lease = acquire(storage, config.storage.lease_stale_seconds, sleep)
    try:
        ledger = Ledger(storage)
        record, found = ledger.open_run(
            RunRecord(
                fingerprint=run_fingerprint,
                schema_version=SCHEMA_VERSION,
                parts=parts,
                input=plan.identity,
                resolved=resolved.to_dict(),
                config=asdict(config),
                versions=_versions(),
                created_at=now(),
            )
        )
        plan = publish_input(plan, storage)
        units, num_units, num_requests = _units_left(ledger, plan, retry_errors=config.retry_errors)
    except BaseException:
        lease.release()
        raise
    logger.info("%s run %s in %s: %d of %d units to do", "Resuming" if record.is_resumed else "New", record.fingerprint,
                storage.uri, num_units, plan.num_units)  # fmt: skip
    return OpenRun(
        storage=storage,
        lease=lease,
        plan=plan,
        order=_order(config, resolved, plan, storage.uri, record),
        units=units,
        num_units=num_units,
        num_requests=num_requests,
        resolved=resolved,
        record=record,
        found=found,
    )


def _order(config: RunConfig, resolved: Resolved, plan: Plan, output: str, record: RunRecord) -> WorkOrder:
    dataset = DatasetSpec(
        output=output,
        storage=config.storage,
        form=config.output,
        images_per_prompt=config.sampling.images_per_prompt,
        columns=plan.spec.columns,
        model=resolved.model.name,
        policy=resolved.policy.name,
        fingerprint=record.fingerprint,
    )
    session = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return WorkOrder(input=plan.spec, dataset=dataset, session=session, unit_requests=plan.identity.unit_requests)


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
    per_unit = plan.identity.unit_requests
    num_requests = num_left * per_unit
    if num_left and not is_done[-1]:  # the last unit may be shorter
        num_requests -= plan.num_units * per_unit - plan.identity.num_requests
    return (plan.unit(index) for index, done in enumerate(is_done) if not done), num_left, num_requests


def _versions() -> dict[str, str]:
    names = ("skipvar", "torch", "numpy", "ray", "pyarrow", "pillow", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
