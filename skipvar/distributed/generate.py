"""A whole run, from a configuration to a dataset and a verdict."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from skipvar.config import RunConfig
from skipvar.distributed.cluster import connect
from skipvar.distributed.cost import Cost
from skipvar.distributed.driver import Driver
from skipvar.distributed.environment import resolve_paths
from skipvar.distributed.fleet import Fleet
from skipvar.distributed.logs import StoredLog, log_name
from skipvar.distributed.messages import Stopped, UnitDone
from skipvar.distributed.metrics import Metrics
from skipvar.distributed.opening import OpenRun, check_store_answers, known_input, locate, open_run
from skipvar.distributed.prometheus import RunMetrics
from skipvar.distributed.replica import EngineFactory
from skipvar.distributed.stopping import StopSignal
from skipvar.engine.resolved import resolve
from skipvar.engine.statistics import merge_statistics
from skipvar.errors import SkipvarError, StorageError
from skipvar.local import build_local_engine
from skipvar.report.page import REPORT, write_report
from skipvar.report.sheet import write_sheet
from skipvar.shards.cache import StoredFiles
from skipvar.shards.lease import Lease
from skipvar.shards.ledger import State
from skipvar.shards.prompts import plan_input
from skipvar.shards.storage import Storage

logger = logging.getLogger(__name__)

EXIT_ALL_ROWS, EXIT_USAGE, EXIT_ERROR_ROWS, EXIT_STOPPED = 0, 2, 3, 4
LAST_RETRY_SECONDS = 5.0
RELEASE_SECONDS = 10.0
STOP_SECONDS = 30.0
"""How long replicas may take to publish what is complete when a run is stopped."""
SHEET = "preview.png"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    exit_code: int
    state: str
    output: str
    counts: dict[str, Any]
    """Requests, images and errors of the dataset; strategies and statistics of this session."""
    reason: str | None = None
    """Why it was stopped."""


def generate(config: RunConfig, stop: StopSignal, engine_factory: EngineFactory = build_local_engine) -> Outcome:
    """Make what is left of a run. Raises `SkipvarError` for what is found before any work (exit 2)."""
    if config.max_seconds is not None:
        stop.stop_after(config.max_seconds)
    config = resolve_paths(locate(config))
    check_store_answers(config)
    with StoredLog() as log, _library_log(log), connect(config) as cluster:
        resolved = resolve(config, StoredFiles(config.storage), cluster.device)
        plan = plan_input(config, resolved.num_scales, resolved.max_image_pixels, known_input(config))
        run = open_run(config, resolved, plan, stop.sleep)
        log.attach(run.storage, log_name(run.session, "driver"))
        with _heartbeat(run.lease, stop):
            metrics = _metrics(config, run)
            statistics: list[dict[str, Any]] = []
            error: SkipvarError | None = None
            if run.num_units:
                cluster.start()
                fleet = Fleet(cluster, partial(engine_factory, config, resolved), run.order())
                try:
                    error = _work(Driver(config, fleet, cluster.room, run, metrics, stop))
                    statistics = _end(fleet, metrics)
                finally:
                    for member in list(fleet.members):
                        fleet.drop(member)
            if isinstance(error, StorageError):  # it had its retries; what is said at the end gets a few seconds
                run = run.hurried(LAST_RETRY_SECONDS)
                log.attach(run.storage, log_name(run.session, "driver"))
            outcome = _outcome(run, metrics, statistics, error)
            if error is not None and error.exit_code == EXIT_USAGE and not metrics.num_units:
                run.withdraw()  # a mistake that only a replica could find: as if found before any work
                raise error
            return outcome


def _metrics(config: RunConfig, run: OpenRun) -> Metrics:
    record = run.ledger.read_run() or {}
    usd_before = ((record.get("counts") or {}).get("cost") or {}).get("usd") or 0.0
    num_before = run.plan.num_requests - run.num_requests
    return Metrics(run.plan.num_requests, num_before, Cost(config.budget, usd_before), RunMetrics())


def _work(driver: Driver) -> SkipvarError | None:
    """Make all units; what stopped it, if anything did."""
    try:
        driver.run()
    except SkipvarError as error:
        logger.error("%s", error)
        return error
    return None


def _end(fleet: Fleet, metrics: Metrics) -> list[dict[str, Any]]:
    """End the replicas; counts what they still published and returns their engines' statistics."""
    statistics = []
    for _, message in fleet.stop(STOP_SECONDS):
        if isinstance(message, UnitDone) and message.report is not None:
            metrics.published(message.report)
        elif isinstance(message, Stopped):
            statistics.append(dict(message.statistics))
    metrics.close()
    return statistics


def _outcome(run: OpenRun, metrics: Metrics, statistics: list[dict[str, Any]], error: SkipvarError | None) -> Outcome:
    """Count what the output holds, record how the run ended, and say so by an exit code."""
    counts: dict[str, Any] = {
        "requests": run.plan.num_requests,
        "session_images": metrics.num_images,
        "session_errors": metrics.num_failures,
        "session_seconds": round(metrics.seconds, 1),
        "strategies": dict(metrics.strategies),
        "differing_units": metrics.num_differing_units,
        "replicas": len(statistics),
        "engine": merge_statistics(statistics) if statistics else None,
        "cost": metrics.cost.to_dict(metrics.num_images),
    }
    reason = None if error is None else str(error)
    state: State = "stopped"
    try:
        if reason is None:
            num_left = run.plan.num_units - len(run.ledger.done_units())
            if num_left:
                reason = f"{num_left} of {run.plan.num_units} units are not made yet; run again without retry_errors."
            else:
                counts["errors"] = run.ledger.num_errors()
                counts["images"] = counts["requests"] - counts["errors"]
                state = "finished_with_errors" if counts["errors"] else "finished"
                _show(run.storage, state)
        run.ledger.finish(state, counts)
    except SkipvarError as trouble:
        reason, state = reason or str(trouble), "stopped"
    code = {"stopped": EXIT_STOPPED, "finished_with_errors": EXIT_ERROR_ROWS, "finished": EXIT_ALL_ROWS}[state]
    return Outcome(exit_code=code, state=state, output=run.storage.uri, counts=counts, reason=reason)


def _show(storage: Storage, state: str) -> None:
    """Contact sheet and report. The dataset is whole without them: what fails here is a warning."""
    shows: tuple[Callable[[], Any], ...] = (
        lambda: write_sheet(storage, SHEET),
        lambda: write_report(storage, {"state": state}),
    )
    for show in shows:
        try:
            show()
        except Exception as error:
            logger.warning("A picture or page of the run could not be made: %s", error)


def summary(outcome: Outcome) -> str:
    """What a person wants to know at the end: how much, where it is, how to open it, the mix of strategies."""
    counts, path = outcome.counts, outcome.output
    made, seconds = counts["session_images"], counts["session_seconds"]
    lines = [f"{outcome.state}: {made} images in {seconds:.0f} s ({made / max(seconds, 0.1):.2f} images/s)"]
    if counts["session_errors"] or counts.get("errors"):
        lines.append(f"errors: {counts['session_errors']} now, {counts.get('errors', '?')} in all, see {path}/errors/")
    mix = ", ".join(f"{name} {count}" for name, count in sorted(counts["strategies"].items()))
    lines.append(f"strategies: {mix or 'none made in this session'}")
    if counts["cost"]["usd"] is not None:
        each = counts["cost"]["usd_per_image"]
        lines.append(f"cost: {counts['cost']['usd']:.2f} USD" + (f", {each:.2g} an image" if each else ""))
    if outcome.reason:
        lines.append(f"reason: {outcome.reason}")
    else:
        lines += [f"contact sheet: {path}/{SHEET}", f"report: {path}/{REPORT}"]
    lines.append(f"dataset: {path}")
    loader = f"load_dataset('parquet', data_files='{path}/data/*.parquet', split='train')"
    lines.append(f'open it: python -c "from datasets import load_dataset; print({loader})"')
    return "\n".join(lines)


@contextlib.contextmanager
def _library_log(log: logging.Handler) -> Iterator[None]:
    """Let the library's records of INFO and above reach the driver's log file."""
    library = logging.getLogger("skipvar")
    library.addHandler(log)
    library.setLevel(logging.INFO)
    try:
        yield
    finally:
        library.removeHandler(log)


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
