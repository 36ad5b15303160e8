"""How a run ended: what its output holds, said in `_run.json`, in pictures and pages, in words, and by an exit code."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from skipvar.distributed.metrics import Metrics, cost_text
from skipvar.distributed.opening import OpenRun
from skipvar.engine.resolved import Resolved
from skipvar.engine.statistics import EngineStatistics
from skipvar.errors import EXIT_ALL_ROWS, EXIT_ERROR_ROWS, EXIT_STOPPED, SkipvarError
from skipvar.quality.audit_book import AuditBook
from skipvar.report.gather import RunFacts
from skipvar.report.page import REPORT, write_report
from skipvar.report.sheet import SHEET, write_sheet
from skipvar.shards.record import RunRecord, State, now
from skipvar.shards.storage import Storage

logger = logging.getLogger(__name__)

Shown = TypeVar("Shown")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    state: State
    output: str
    counts: dict[str, Any]
    """Requests, images and errors of the dataset; strategies and statistics of this session."""
    resolved: Resolved
    """What its images depend on besides their requests, as its replicas found it."""
    reason: str | None = None
    """Why it was stopped."""
    facts: RunFacts | None = None
    """What the run's page tells; None where it could not be made."""
    alarm: str | None = None
    """The audit's alarm, in a sentence."""

    @property
    def exit_code(self) -> int:
        return {"finished": EXIT_ALL_ROWS, "finished_with_errors": EXIT_ERROR_ROWS}.get(self.state, EXIT_STOPPED)


def conclude(run: OpenRun, metrics: Metrics, error: SkipvarError | None, audits: AuditBook | None) -> Outcome:
    """Count what the output holds, record how the run ended, and say so by an exit code."""
    counts = _session_counts(run, metrics, audits)
    reason = None if error is None else str(error)
    state: State = "stopped"
    facts: RunFacts | None = None
    try:
        if run.lease.is_over:  # the output is another run's now, and so is what its record and its page say
            reason = reason or "another run took over this output"
        elif reason is None:
            num_left = run.plan.num_units - len(run.ledger.done_units())
            if num_left:
                reason = f"{num_left} of {run.plan.num_units} units are not made yet; run again without retry_errors."
            else:
                counts["errors"] = run.ledger.num_errors()
                counts["images"] = counts["requests"] - counts["errors"]
                state = "finished_with_errors" if counts["errors"] else "finished"
                _warned(lambda: write_sheet(run.storage))
                facts = _report(run.storage, state, counts)
                counts["audit"] = None if facts is None else asdict(facts.audit)
        if not run.lease.is_over:
            run.ledger.finish(state, counts)
            if state == "stopped" and metrics.num_units:  # after its last word: whoever stops it may not wait long
                facts = _report(run.storage, state, counts)
    except SkipvarError as trouble:
        reason, state = reason or str(trouble), "stopped"
    return Outcome(
        state=state,
        output=run.storage.uri,
        counts=counts,
        resolved=run.resolved,
        reason=reason,
        facts=facts,
        alarm=None if audits is None or audits.alarm is None else audits.alarm.text(audits.promise),
    )


def _session_counts(run: OpenRun, metrics: Metrics, audits: AuditBook | None) -> dict[str, Any]:
    """What is known without looking at the output."""
    engines = [*_engines_before(run.record), *metrics.engines]
    total = EngineStatistics()
    for engine in engines:
        total.add(engine)
    return {
        "requests": run.plan.identity.num_requests,
        "session_images": metrics.num_images,
        "session_errors": metrics.num_failures,
        "session_seconds": round(metrics.seconds, 1),
        "strategies": dict(metrics.strategies),
        "differing_units": metrics.num_differing_units,
        "replicas": len(metrics.engines),
        "devices": [asdict(device) for device in metrics.devices],
        "engine": total.to_dict() if engines else None,
        "cost": metrics.cost.to_dict(metrics.num_images),
        "audit_state": None if audits is None else audits.to_dict(),
    }


def _engines_before(record: RunRecord) -> list[EngineStatistics]:
    """What the engines of earlier sessions did, if a session that ended in order told it."""
    told = record.part("counts", "engine")
    try:
        return [EngineStatistics.from_dict(told)] if told else []
    except (KeyError, TypeError, AttributeError):
        logger.warning("What the run's record tells of earlier engines cannot be read: it is left out")
        return []


def _report(storage: Storage, state: State, counts: Mapping[str, Any]) -> RunFacts | None:
    """Write the page of a run that is about to end; what it tells. None where that failed."""
    return _warned(lambda: write_report(storage, {"state": state, "counts": counts, "ended_at": now()}))


def _warned(show: Callable[[], Shown]) -> Shown | None:
    """What `show` gives. The dataset is whole without pictures and pages: what fails here is a warning."""
    try:
        return show()
    except Exception as error:
        logger.warning("A picture or page of the run could not be made: %s", error)
        return None


def summary(outcome: Outcome) -> str:
    """What a person wants to know at the end: how much, where it is, how to open it, the mix of strategies."""
    counts, path = outcome.counts, outcome.output
    made, seconds = counts["session_images"], counts["session_seconds"]
    lines = [f"{outcome.state}: {made} images in {seconds:.0f} s ({made / max(seconds, 0.1):.2f} images/s)"]
    if counts["session_errors"] or counts.get("errors"):
        lines.append(f"errors: {counts['session_errors']} now, {counts.get('errors', '?')} in all, see {path}/errors/")
    mix = ", ".join(f"{name} {count}" for name, count in sorted(counts["strategies"].items()))
    lines.append(f"strategies: {mix or 'none made in this session'}")
    if cost := cost_text(counts["cost"]):
        lines.append(f"cost: {cost}")
    if outcome.facts is not None and outcome.facts.audit.images:
        lines.append(f"audit: {outcome.facts.audit.text()}")
    if outcome.alarm is not None and outcome.alarm not in (outcome.reason or ""):
        lines.append(outcome.alarm)
    if outcome.reason:
        lines.append(f"reason: {outcome.reason}")
    else:
        lines.append(f"contact sheet: {path}/{SHEET}")
    lines.append(f"dataset: {path}")
    loader = f"load_dataset('parquet', data_files='{path}/data/*.parquet', split='train')"
    lines.append(f'open it (pip install datasets): python -c "from datasets import load_dataset; print({loader})"')
    if outcome.facts is not None:
        lines.append(f"report: {path}/{REPORT}")
    return "\n".join(lines)
