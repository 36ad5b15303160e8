"""The driver alone: its own code against replicas that are simulated, its costs measured as it runs.

A discrete-event simulation: the simulated clock goes on by the processor time that the driver really spends, and jumps
to the next event where it has nothing to do. So the share of replica time lost is what replicas wait for the driver to
hand them a unit. What Ray's own calls cost is measured with real actors (`ray_calls`) and charged for each.
"""

import heapq
import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from skipvar.benchmarks.null_run import UNIT_ROWS, null_metrics, null_report, null_run, null_started
from skipvar.benchmarks.planning import peak_bytes
from skipvar.config import ClusterConfig, ReplicasConfig, RunConfig
from skipvar.distributed.driver import Driver
from skipvar.distributed.fleet import Member
from skipvar.distributed.messages import Progress, ToDriver, UnitDone
from skipvar.distributed.stopping import StopSignal
from skipvar.types import UnitReport

MAX_EVENTS_A_ROUND = 1000


@dataclass
class _Replica:
    free_at: float
    """When it will have made all that it holds."""
    num_read: int = 0
    num_published: int = 0
    said_at: float = 0.0
    report_seconds: float = 1.0


class SimulatedFleet:
    """Replicas that only take time; stands where the driver expects its `Fleet`."""

    def __init__(self, unit_seconds: float, call_seconds: float) -> None:
        self.members: list[Member] = []
        self.lost_seconds = 0.0
        """Between two units of a replica, or before its first."""
        self.driver_seconds = 0.0
        self.now = 0.0
        self._unit_seconds, self._call_seconds = unit_seconds, call_seconds
        self._replicas: dict[Member, _Replica] = {}
        self._coming: list[tuple[float, int, Member, UnitReport | None]] = []
        """What replicas will say, and when; without a report it is only how far they are."""
        self._numbers = itertools.count()
        self._random = random.Random(0)
        self._mark = time.thread_time()
        self._answering: Member | None = None

    def grow(self, size: int) -> None:
        """Create replicas until there are `size`; each has started at once."""
        for number in range(len(self.members), size):
            member = Member(f"replica-{number}", None)
            self.members.append(member)
            self._replicas[member] = _Replica(free_at=self.now)
            self._at(self.now, member, None)

    def send(self, member: Member, message: Any) -> None:
        """Give a replica units; it makes one after another, each in 0.5 to 1.5 times `unit_seconds`."""
        self._charge(num_calls=member is not self._answering)
        replica = self._replicas[member]
        replica.report_seconds = message.report_seconds
        for assignment in message.assignments:
            self.lost_seconds += max(0.0, self.now - replica.free_at)
            seconds = self._random.uniform(0.5, 1.5) * self._unit_seconds
            replica.free_at = max(self.now, replica.free_at) + seconds
            replica.num_read += 1
            self._at(replica.free_at, member, null_report(assignment.unit.index))

    def events(self, _timeout_seconds: float) -> Iterator[tuple[Member, ToDriver]]:
        """What replicas say, up to `MAX_EVENTS_A_ROUND` events; where none is due yet, the clock jumps to the next."""
        self._charge()
        if self._coming and self._coming[0][0] > self.now:  # nothing to do for the driver until then
            self.now = self._coming[0][0]
        for _ in range(MAX_EVENTS_A_ROUND):
            if not self._coming or self._coming[0][0] > self.now:
                return
            _, _, member, report = heapq.heappop(self._coming)
            if report is None and self._is_quiet(member):
                continue
            self._charge(num_calls=1)
            self._answering = member
            for message in self._said(member, report):
                yield member, message
                self._charge()
            self._answering = None

    def _is_quiet(self, member: Member) -> bool:
        """It told how far it is with something else meanwhile; it will again in due time."""
        replica = self._replicas[member]
        due = replica.said_at + replica.report_seconds
        if member.is_up and due > self.now:
            self._at(due, member, None)
            return True
        return False

    def _said(self, member: Member, report: UnitReport | None) -> Iterator[ToDriver]:
        """What a replica says now: that a unit is done, and how far it is (also where it was quiet for too long)."""
        replica = self._replicas[member]
        replica.said_at = self.now
        if not member.is_up:
            yield null_started()
        if report is None:
            self._at(self.now + replica.report_seconds, member, None)
        else:
            replica.num_published += 1
            yield UnitDone(unit=report.unit, report=report)
        yield Progress(
            num_steps=replica.num_published,
            num_published=replica.num_published,
            num_read=replica.num_read,
            num_unfinished=(replica.num_read - replica.num_published) * UNIT_ROWS,
        )

    def _at(self, when: float, member: Member, report: UnitReport | None) -> None:
        heapq.heappush(self._coming, (when, next(self._numbers), member, report))

    def clock(self) -> float:
        """Simulated seconds since the start."""
        return self.now

    def _charge(self, num_calls: int = 0) -> None:
        """Let the simulated clock go on by what the driver has really spent since, and by what its calls would cost."""
        mark = time.thread_time()
        spent = mark - self._mark + num_calls * self._call_seconds
        self._mark = mark
        self.now += spent
        self.driver_seconds += spent


def measure_driver(
    num_replicas: int,
    num_units: int,
    unit_seconds: float,
    show: Callable[[str], None],
    call_seconds: float = 0.0,
) -> dict[str, Any]:
    """Units a second that the driver accounts for, bytes that it grows by, the share of replica time that it loses.

    `call_seconds`: processor time that a call of Ray's costs the driver (`ray_calls.measure_calls`).
    """
    config = RunConfig(cluster=ClusterConfig(replicas=ReplicasConfig(min=num_replicas, max=num_replicas)))
    fleet = SimulatedFleet(unit_seconds, call_seconds)
    played: Any = fleet
    cluster: Any = SimpleNamespace(room=lambda: num_replicas, leaving_nodes=frozenset)  # no simulated node ever goes
    run, metrics = null_run(num_units), null_metrics(num_units)
    driver = Driver(config, cluster, played, run, metrics, StopSignal(), clock=fleet.clock)
    before = peak_bytes()
    driver.run()
    replica_seconds = num_replicas * fleet.now
    show(
        f"{num_units} units by {num_replicas} replicas of {unit_seconds:g} s a unit: {fleet.now:.0f} simulated seconds"
    )
    return {
        "replicas": num_replicas,
        "units": num_units,
        "unit_seconds": unit_seconds,
        "call_seconds": round(call_seconds, 7),
        "units_per_second": round(num_units / fleet.driver_seconds, 1),
        "driver_seconds": round(fleet.driver_seconds, 2),
        "peak_bytes": peak_bytes() - before,
        "lost_share": round(fleet.lost_seconds / replica_seconds, 6),
    }
