"""What Ray's calls cost the driver: its own loop and fleet, with real actors that say of every unit that it is done."""

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Any

from skipvar.benchmarks.null_run import null_metrics, null_report, null_run, null_started
from skipvar.config import ClusterConfig, ModelSection, ReplicasConfig, RunConfig
from skipvar.distributed.cluster import connect
from skipvar.distributed.driver import Driver
from skipvar.distributed.fleet import Fleet, Member
from skipvar.distributed.messages import (
    Progress,
    Stop,
    Stopped,
    Supply,
    ToDriver,
    ToReplica,
    UnitDone,
    pack,
    unpack,
)
from skipvar.distributed.stopping import StopSignal
from skipvar.engine.statistics import EngineStatistics


class NullReplica:
    """Speaks as `Replica` does; makes nothing, and is done at once."""

    def __init__(self, *_: Any) -> None:
        self._outbox: asyncio.Queue[ToDriver] = asyncio.Queue()
        self._outbox.put_nowait(null_started())
        self._num_done = 0

    async def send(self, message: ToReplica) -> None:
        """Answers each assignment with `UnitDone` and `Progress`, and `Stop` with `Stopped`."""
        if isinstance(message, Stop):
            self._outbox.put_nowait(Stopped(statistics=EngineStatistics()))
        for assignment in message.assignments if isinstance(message, Supply) else ():
            self._num_done += 1
            self._outbox.put_nowait(UnitDone(unit=assignment.unit.index, report=null_report(assignment.unit.index)))
            self._outbox.put_nowait(Progress(num_published=self._num_done, num_read=self._num_done))

    async def receive(self, messages: bytes) -> bytes:
        """Takes packed messages, waits until there is something to say, and returns all of it, packed."""
        for message in unpack(messages):
            await self.send(message)
        said = [await self._outbox.get()]
        while not self._outbox.empty():
            said.append(self._outbox.get_nowait())
        return pack(said)


class _CountingFleet(Fleet):
    """A real fleet that counts its calls from the first unit on."""

    num_calls = 0
    cpu_started = wall_started = 0.0

    def send(self, member: Member, message: ToReplica) -> None:
        if not self.wall_started:  # all replicas are up
            self.num_calls = 0
            self.cpu_started, self.wall_started = time.process_time(), time.monotonic()
        self.num_calls += member.is_heard
        super().send(member, message)

    def _listen(self, member: Member) -> None:
        self.num_calls += 1
        super()._listen(member)


@dataclass(frozen=True)
class CallCost:
    """Of a driver at work."""

    actors: int
    calls: int
    driver_seconds: float
    """Processor time of the driver's process, all its threads: Ray's part and the driver's own."""
    units_per_second: float
    """By the clock, actors and Ray's other processes on the same machine."""


def measure_calls(num_actors: int, num_units: int) -> CallCost:
    """Runs the driver with so many real actors, on a local cluster of its own."""
    replicas = ReplicasConfig(min=num_actors, max=num_actors)
    config = RunConfig(model=ModelSection(device="cpu"), cluster=ClusterConfig(address="local", replicas=replicas))
    unused: Any = None  # a `NullReplica` builds no engine and reads no order
    with connect(config) as cluster:
        cluster.start()
        with contextlib.closing(_CountingFleet(cluster, unused, unused, NullReplica)) as fleet:
            run, metrics = null_run(num_units), null_metrics(num_units)
            Driver(config, cluster, fleet, run, metrics, StopSignal()).run()
            cpu, wall = time.process_time() - fleet.cpu_started, time.monotonic() - fleet.wall_started
    return CallCost(num_actors, fleet.num_calls, cpu, num_units / wall)
