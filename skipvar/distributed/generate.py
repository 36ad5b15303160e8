"""A whole run, from a configuration to a dataset and a verdict."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial

from skipvar.config import RunConfig
from skipvar.distributed.cluster import connect
from skipvar.distributed.driver import Driver
from skipvar.distributed.fleet import Fleet
from skipvar.distributed.logs import StoredLog, log_name
from skipvar.distributed.metrics import Cost, Metrics
from skipvar.distributed.opening import OpenRun, look_at_output, open_run, open_writable, settle
from skipvar.distributed.outcome import Outcome, conclude
from skipvar.distributed.replica import EngineFactory
from skipvar.distributed.stopping import StopSignal
from skipvar.errors import EXIT_USAGE, SkipvarError, StorageError
from skipvar.local import build_local_engine
from skipvar.quality.audit_book import AuditBook
from skipvar.shards.lease import Lease
from skipvar.shards.prompts import Plan
from skipvar.shards.storage import open_storage

logger = logging.getLogger(__name__)

AUDIT_STATE = "_audit"
"""Where audits are counted in the output, unless the configuration names another place."""
LAST_RETRY_SECONDS = 5.0
RELEASE_SECONDS = 10.0


def generate(
    config: RunConfig,
    stop: StopSignal,
    engine_factory: EngineFactory = build_local_engine,
    check: Callable[[Plan], None] | None = None,
) -> Outcome:
    """Make what is left of a run. Raises `SkipvarError` for what is found before any work (exit 2).

    `check` is shown the plan before anything is written, and may refuse it.
    """
    if config.max_seconds is not None:
        stop.stop_after(config.max_seconds)
    config = settle(config)
    look_at_output(config)
    with contextlib.closing(StoredLog()) as log, connect(config) as cluster:
        run = open_run(config, cluster.device, stop.sleep, check)
        log.attach(run.storage, log_name(run.order.session, "driver"))
        with _heartbeat(run.lease, stop):
            metrics = _metrics(config, run)
            audits: AuditBook | None = None
            error: SkipvarError | None = None
            try:
                audits = _open_audits(config, run)
            except SkipvarError as refusal:
                error = refusal
            if run.num_units and error is None:
                cluster.start()
                build_engine = partial(engine_factory, config, run.resolved)
                with contextlib.closing(Fleet(cluster, build_engine, run.order)) as fleet:
                    driver = Driver(config, cluster, fleet, run, metrics, stop, audits)
                    error = _error_of(driver.run)
                    driver.end()
            if error is not None and error.exit_code == EXIT_USAGE and not metrics.num_units:
                log.discard()
                run.withdraw()  # a mistake that only a replica could find: as if found before any work
                raise error
            if audits is not None and not isinstance(error, StorageError):
                error = error or _error_of(lambda: _count_published(audits, run))
            if isinstance(error, StorageError):  # it had its retries; what is said at the end gets a few seconds
                run = run.with_patience(LAST_RETRY_SECONDS)
                log.attach(run.storage, log_name(run.order.session, "driver"))
            return conclude(run, metrics, error, audits)


def _open_audits(config: RunConfig, run: OpenRun) -> AuditBook | None:
    """The book with all that the run has published; None where no promise is audited.

    Raises `ConfigError` where the state is that of another promise.
    """
    promise = run.resolved.promise
    if promise is None:
        return None
    if config.audit.state is not None:
        storage = open_writable(config.audit.state, config.storage)
    else:
        storage = open_storage(f"{run.storage.uri}/{AUDIT_STATE}", config.storage)
    parts = run.resolved.fingerprint_parts()
    subject = {"policy": parts["policy"], "model": parts["model"]}
    book = AuditBook(storage, promise, subject, run.record.fingerprint, run.plan.num_units)
    _count_published(book, run)
    return book


def _count_published(book: AuditBook, run: OpenRun) -> None:
    """Count all that is published and next in order."""
    book.catch_up(run.storage)
    book.count()


def _metrics(config: RunConfig, run: OpenRun) -> Metrics:
    usd_before = run.record.part("counts", "cost").get("usd") or 0.0
    num_requests = run.plan.identity.num_requests
    return Metrics(num_requests, num_requests - run.num_requests, Cost(config.budget, usd_before))


def _error_of(work: Callable[[], None]) -> SkipvarError | None:
    """Do it; what stopped it, if anything did."""
    try:
        work()
    except SkipvarError as error:
        logger.error("%s", error)
        return error
    return None


@contextlib.contextmanager
def _heartbeat(lease: Lease, stop: StopSignal) -> Iterator[None]:
    """Beat while the run lasts, then release; a lease that another run took over stops this one."""
    end = threading.Event()

    def beat() -> None:
        while not end.wait(lease.interval_seconds):
            if not lease.beat():
                stop.stop("another run that took over this output")
                return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        release = threading.Thread(target=lease.release, name="release", daemon=True)
        release.start()
        release.join(RELEASE_SECONDS)  # where the storage is gone, the next run waits for a stale lease instead
