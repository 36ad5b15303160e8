"""The worker's plain twin: one unit after the other, one thread, nothing overlaps."""

from collections.abc import Callable, Iterable
from typing import Any

from skipvar.distributed.messages import Assignment
from skipvar.types import Failure, Image, Request, UnitReport


def make_units(
    engine: Any,
    read_requests: Callable[[Assignment], Iterable[Request | Failure]],
    open_writer: Callable[[Assignment], Any],
    assignments: Iterable[Assignment],
) -> list[UnitReport | None]:
    """The report of each unit, None for an isolation."""
    reports: list[UnitReport | None] = []
    for assignment in assignments:
        items = list(read_requests(assignment))
        finished: list[Image | Failure] = [item for item in items if isinstance(item, Failure)]
        engine.submit([item for item in items if isinstance(item, Request)])
        while engine.can_step(flush=True):
            finished += engine.step(flush=True)
        if assignment.is_isolation:
            reports.append(None)
            continue
        writer = open_writer(assignment)
        for item in finished:
            writer.add(item)
        reports.append(writer.publish())
    return reports
