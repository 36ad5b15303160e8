"""Opening a run: where its output is, what its fingerprint is made of, which units are left. No Ray."""

import dataclasses
import logging
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from skipvar.config import RunConfig, to_dict
from skipvar.distributed.environment import resolve_paths
from skipvar.engine.resolved import Resolved, resolve
from skipvar.model.device import Device
from skipvar.shards.cache import StoredFiles
from skipvar.shards.lease import Lease, acquire
from skipvar.shards.ledger import Ledger
from skipvar.shards.prompts import Plan, PublishedInput, find_published, plan_input, publish_input
from skipvar.shards.record import FINGERPRINT_DIGITS, RunRecord, fingerprint
from skipvar.shards.rows import InputSpec
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
    """Names the logs."""
    unit_requests: int
    """Requests of a full unit."""

    def wanted_requests(self, pool_images: int) -> int:
        """Requests that an engine with so large a pool should have in hand, so that it always has images to mix."""
        return max(MIN_UNITS_AHEAD * self.unit_requests, POOLS_AHEAD * pool_images)


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A run that this process holds the lease of."""

    storage: Storage
    ledger: Ledger
    lease: Lease
    plan: Plan
    dataset: DatasetSpec
    units: Iterator[Unit]
    """Those still to be made, one at a time: never all in memory, but for retries, with the keys of what failed."""
    num_units: int
    num_requests: int
    """Requests of those units."""
    resolved: Resolved
    record: RunRecord
    """As it was when the run was opened: a resumed one's tells of earlier sessions."""
    is_resumed: bool
    session: str
    """When this process began to work on the run, UTC: names its logs."""

    @property
    def unit_requests(self) -> int:
        """Requests of a full unit."""
        return self.plan.identity.unit_requests

    def order(self) -> WorkOrder:
        return WorkOrder(
            input=self.plan.spec, dataset=self.dataset, session=self.session, unit_requests=self.unit_requests
        )

    def with_retry_seconds(self, retry_seconds: float) -> "OpenRun":
        """The same run, with no more patience than this for its output."""
        storage = open_storage(self.storage.uri, replace(self.dataset.storage, retry_seconds=retry_seconds))
        return replace(self, storage=storage, ledger=Ledger(storage))

    def withdraw(self) -> None:
        """Take back a run that never made anything, so that its output is free for the right configuration."""
        if not self.is_resumed and not self.lease.is_over:
            self.ledger.withdraw()


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
    asked = [config.output.path, *inputs, config.policy, model.path, model.vae_path, model.text_encoder_path]
    uri = next((uri for uri in asked if uri is not None and uri.startswith("s3://")), None)
    if uri is not None:
        storage = replace(config.storage, retry_seconds=min(config.storage.retry_seconds, START_PATIENCE_SECONDS))
        bucket, key = split_s3(uri)
        next(open_storage(f"s3://{bucket}", storage).list(re.split(r"[{*?[]", key)[0]), None)


def look_at_output(config: RunConfig) -> None:
    """Raise where it is plain that the output cannot be written, before anything is planned. Writes nothing."""
    storage = replace(config.storage, retry_seconds=min(config.storage.retry_seconds, START_PATIENCE_SECONDS))
    open_storage(config.output.path.replace(FINGERPRINT_FIELD, "0" * FINGERPRINT_DIGITS), storage).look()


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
        "sampling": dataclasses.asdict(config.sampling) | {"size": resolved.size},
        "output": {"image_format": config.output.image_format, "unit_rows": config.output.unit_rows},
        "columns": {"prompt": config.input.prompt_column, "id": config.input.id_column, "limit": config.input.limit},
        "input": dataclasses.asdict(plan.identity),
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
    output = config.output.path.replace(FINGERPRINT_FIELD, fingerprint(parts))
    storage = open_storage(output, config.storage)
    storage.check_writable()
    lease = acquire(storage, config.storage.lease_stale_seconds, sleep)
    try:
        ledger = Ledger(storage)
        record, is_resumed = ledger.open_run(
            RunRecord.new(
                parts, plan.identity, resolved=resolved.to_dict(), config=to_dict(config), versions=_versions()
            )
        )
        plan = publish_input(plan, storage)
        units, num_units, num_requests = _units_left(ledger, plan, retry_errors=config.retry_errors)
    except BaseException:
        lease.release()
        raise
    logger.info("%s run %s in %s: %d of %d units to do", "Resuming" if is_resumed else "New", record.fingerprint,
                storage.uri, num_units, plan.num_units)  # fmt: skip
    return OpenRun(
        storage=storage,
        ledger=ledger,
        lease=lease,
        plan=plan,
        dataset=DatasetSpec(
            output=storage.uri,
            storage=config.storage,
            form=config.output,
            images_per_prompt=config.sampling.images_per_prompt,
            columns=plan.columns,
            model=resolved.model.name,
            policy=resolved.policy.name,
            fingerprint=record.fingerprint,
        ),
        units=units,
        num_units=num_units,
        num_requests=num_requests,
        resolved=resolved,
        record=record,
        is_resumed=is_resumed,
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
    per_unit = plan.identity.unit_requests
    num_requests = num_left * per_unit
    if num_left and not is_done[-1]:  # the last unit may be shorter
        num_requests -= plan.num_units * per_unit - plan.identity.num_requests
    return (plan.unit(index) for index, done in enumerate(is_done) if not done), num_left, num_requests


def _versions() -> dict[str, str]:
    names = ("skipvar", "torch", "numpy", "ray", "pyarrow", "pillow", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
