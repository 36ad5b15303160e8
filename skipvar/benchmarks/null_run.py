"""A run of units that hold nothing, and what replicas say that make nothing: for what measures the driver alone."""

from types import SimpleNamespace
from typing import Any

from skipvar.distributed.messages import Started
from skipvar.distributed.metrics import Metrics
from skipvar.engine.resolved import DeviceReport
from skipvar.types import Unit, UnitReport

UNIT_ROWS = 16
WANTED_UNITS = 2
"""A replica is well supplied with so many: the one that it makes, and the next."""


def null_run(num_units: int) -> Any:
    """What the driver needs of an open run."""
    units = (Unit(index=i, first_position=i * UNIT_ROWS, num_rows=UNIT_ROWS, slices=()) for i in range(num_units))
    return SimpleNamespace(units=units, num_units=num_units, unit_requests=UNIT_ROWS)


def null_metrics(num_units: int) -> Metrics:
    """Of a run of `num_units` units that was not resumed."""
    return Metrics(num_units * UNIT_ROWS, 0)


def null_started() -> Started:
    """What a replica says once it is up: it has no device and wants `WANTED_UNITS` units."""
    device = DeviceReport(processor="none", torch="", batch_size={}, pool_images=UNIT_ROWS, self_check=None)
    return Started(report=device, wanted_requests=WANTED_UNITS * UNIT_ROWS)


def null_report(unit: int) -> UnitReport:
    """A unit of `UNIT_ROWS` images, all under `base`."""
    return UnitReport(
        unit=unit,
        num_images=UNIT_ROWS,
        num_failures=0,
        same_content=True,
        strategies={"base": UNIT_ROWS},
    )
