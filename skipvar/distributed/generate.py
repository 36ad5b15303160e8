"""A whole run, from a configuration to a dataset and a verdict."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from skipvar.config import RunConfig
from skipvar.distributed.cluster import connect
from skipvar.distributed.driver import Driver, start_first_replica
from skipvar.distributed.environment import resolve_paths
from skipvar.distributed.fleet import Fleet, Member
from skipvar.distributed.logs import StoredLog, log_name
from skipvar.distributed.metrics import Metrics
from skipvar.distributed.opening import OpenRun, locate, open_run, plan_for_model, plan_soon, recall
from skipvar.distributed.replica import EngineFactory, build_real_engine
from skipvar.distributed.stopping import StopSignal
from skipvar.engine.statistics import merge_statistics
from skipvar.errors import SkipvarError, StorageError
from skipvar.report.sheet import write_sheet
from skipvar.shards.lease import Lease
from skipvar.shards.ledger import State
from skipvar.types import UnitReport

logger = logging.getLogger(__name__)

EXIT_ALL_ROWS, EXIT_ERROR_ROWS, EXIT_STOPPED = 0, 3, 4
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


def generate(config: RunConfig, stop: StopSignal, engine_factory: EngineFactory = build_real_engine) -> Outcome:
    """Make what is left of a run. Raises `SkipvarError` for what is found before any work (exit 2)."""
    if config.max_seconds is not None:
        stop.stop_after(config.max_seconds)
    config = resolve_paths(locate(config))
    plan = plan_soon(config)
    config = recall(config)
    with StoredLog() as log, _library_log(log), connect(config) as cluster:
        config = replace(config, model=replace(config.model, device=cluster.device))
        fleet = Fleet(cluster, engine_factory)
        try:
            first, description = start_first_replica(fleet, config, stop)
            known = ("device", "processor", "dtype", "policy", "batch_invariant")
            logger.info("The first replica is up: %s", ", ".join(f"{key} {description[key]}" for key in known))
            plan = plan_for_model(plan, config, description)
            run = open_run(config, plan, description, stop.sleep)
            log.attach(run.storage, log_name(run.session, "driver"))
            config = replace(config, model=replace(config.model, dtype=description["dtype"]))
            with _heartbeat(run.lease, stop):
                metrics = Metrics(run.plan.num_requests, run.plan.num_requests - run.num_requests)
                error = _work(Driver(config, fleet, cluster.room, run, metrics, stop), first)
                statistics = _end(fleet, metrics)
                if isinstance(error, StorageError):  # it had its retries; what is said at the end gets a few seconds
                    run = run.with_patience(replace(config.storage, retry_seconds=LAST_RETRY_SECONDS))
                    log.attach(run.storage, log_name(run.session, "driver"))
                return _verdict(run, metrics, statistics, error)
        finally:
            fleet.stop(timeout_seconds=0)


def _work(driver: Driver, first: Member) -> SkipvarError | None:
    """Make all units; what stopped it, if anything did."""
    try:
        driver.run(first)
    except SkipvarError as error:
        logger.error("%s", error)
        return error
    return None


def _end(fleet: Fleet, metrics: Metrics) -> list[dict[str, Any]]:
    """End the replicas; counts what they still published and returns their engines' statistics."""
    statistics = []
    for event in fleet.stop(STOP_SECONDS):
        if isinstance(event.result, UnitReport):
            metrics.published(event.result)
        elif event.method == "stop" and isinstance(event.result, dict):
            statistics.append(event.result)
    metrics.close()
    return statistics


def _verdict(run: OpenRun, metrics: Metrics, statistics: list[dict[str, Any]], error: SkipvarError | None) -> Outcome:
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
                write_sheet(run.storage, SHEET)
        run.ledger.finish(state, counts)
    except SkipvarError as trouble:
        reason, state = reason or str(trouble), "stopped"
    code = {"stopped": EXIT_STOPPED, "finished_with_errors": EXIT_ERROR_ROWS, "finished": EXIT_ALL_ROWS}[state]
    return Outcome(exit_code=code, state=state, output=run.storage.uri, counts=counts, reason=reason)


def summary(outcome: Outcome) -> str:
    """What a person wants to know at the end: how much, where it is, how to open it, the mix of strategies."""
    counts, path = outcome.counts, outcome.output
    made, seconds = counts["session_images"], counts["session_seconds"]
    lines = [f"{outcome.state}: {made} images in {seconds:.0f} s ({made / max(seconds, 0.1):.2f} images/s)"]
    if counts["session_errors"] or counts.get("errors"):
        lines.append(f"errors: {counts['session_errors']} now, {counts.get('errors', '?')} in all, see {path}/errors/")
    mix = ", ".join(f"{name} {count}" for name, count in sorted(counts["strategies"].items()))
    lines.append(f"strategies: {mix or 'none made in this session'}")
    if outcome.reason:
        lines.append(f"reason: {outcome.reason}")
    else:
        lines.append(f"contact sheet: {path}/{SHEET}")
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
