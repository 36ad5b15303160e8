"""The Ray actor around one engine: thin; what happens to a unit is in worker.py."""

import asyncio
import contextlib
import logging
import queue
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import ray
from ray.util.metrics import Gauge

from skipvar.config import RunConfig
from skipvar.distributed.logs import StoredLog, log_name
from skipvar.distributed.messages import (
    Assignment,
    Progress,
    ReplicaLost,
    RunFailed,
    Started,
    Stopped,
    ToDriver,
    ToReplica,
    pack,
    unpack,
)
from skipvar.distributed.opening import WorkOrder
from skipvar.distributed.worker import Worker, as_assigned
from skipvar.engine.resolved import Resolved
from skipvar.engine.statistics import EngineStatistics
from skipvar.errors import SkipvarError
from skipvar.shards.inputs import Inputs
from skipvar.shards.prompts import read_unit
from skipvar.shards.storage import Storage, open_storage
from skipvar.shards.writer import UnitWriter
from skipvar.types import Failure, Request

if TYPE_CHECKING:  # without torch, which a driver does not need
    from skipvar.engine.engine import Engine

logger = logging.getLogger(__name__)

BuildEngine = Callable[[], "Engine"]
EngineFactory = Callable[[RunConfig, Resolved], "Engine"]
"""Builds an engine: `skipvar.local.build_local_engine`, or a test's."""


class EngineMetrics:
    """What one engine did, on Ray's Prometheus endpoint."""

    def __init__(self, statistics: EngineStatistics, replica: str) -> None:
        self._statistics, self._tags = statistics, {"replica": replica}
        self._pending = Gauge("skipvar_engine_pending", "Requests in the engine without a result", ("replica",))
        self._fill = Gauge("skipvar_batch_fill", "Mean fill of suffix batches since the start", ("replica",))
        self._seconds = Gauge("skipvar_phase_seconds", "Seconds in each phase since the start", ("replica", "phase"))

    def update(self, told: Sequence[ToDriver]) -> None:
        """As often as the driver is told how far it is, by the thread that owns the engine."""
        for message in told:
            if isinstance(message, Progress):
                self._pending.set(message.num_unfinished, self._tags)
        self._fill.set(self._statistics.suffix_fill, self._tags)
        for phase, seconds in self._statistics.seconds.items():
            self._seconds.set(seconds, {**self._tags, "phase": phase})


class Replica:
    """One engine on one device, on a thread of its own. Images never pass through Ray."""

    def __init__(self, name: str, build_engine: BuildEngine, order: WorkOrder, num_encoders: int) -> None:
        self.name = f"{name}@{socket.gethostname()}"
        self._build_engine, self._order, self._num_encoders = build_engine, order, num_encoders
        self._worker: Worker | None = None
        self._outbox: queue.SimpleQueue[Sequence[ToDriver]] = queue.SimpleQueue()
        threading.Thread(target=self._live, name="engine", daemon=True).start()

    async def send(self, message: ToReplica) -> None:
        """Take a message from the driver; before `Started` it only asks whether this one lives."""
        if self._worker is not None:
            self._worker.post(message)

    async def receive(self, messages: bytes) -> bytes:
        """Take what the driver says in answer, then say what there is to say, as soon as there is anything.

        Both `pack`ed.
        """
        for message in unpack(messages):
            await self.send(message)
        said = list(await asyncio.to_thread(self._outbox.get))
        with contextlib.suppress(queue.Empty):
            while True:
                said.extend(self._outbox.get_nowait())
        return pack(said)

    def _live(self) -> None:
        """Load the model, work until the driver says `Stop`, and tell how it ended."""
        try:
            engine = self._build_engine()
            storage = open_storage(self._order.dataset.output, self._order.dataset.storage)
            with contextlib.closing(StoredLog(storage, log_name(self._order.session, self.name))):
                self._worker = self._make_worker(engine, storage)
                wanted, node = self._worker.wanted_requests, ray.get_runtime_context().get_node_id()
                self._outbox.put([Started(report=engine.report, wanted_requests=wanted, node=node)])
                self._worker.run()
            # its log is closed: the driver ends it now
            self._outbox.put([Stopped(statistics=engine.statistics)])
        except SkipvarError as error:
            self._outbox.put([RunFailed(error=error)])
        except BaseException as error:
            logger.exception("The engine failed")
            self._outbox.put([ReplicaLost(reason=f"{type(error).__name__}: {error}")])

    def _make_worker(self, engine: "Engine", storage: Storage) -> Worker:
        order, inputs = self._order, Inputs(self._order.input.storage)
        exported = EngineMetrics(engine.statistics, self.name)

        def read(assignment: Assignment) -> Iterable[Request | Failure]:
            return as_assigned(read_unit(assignment.unit, order.input, inputs), assignment)

        def open_writer(assignment: Assignment) -> UnitWriter:
            dataset = replace(order.dataset, policy="fixed:base") if assignment.must_be_base else order.dataset
            return UnitWriter(assignment.unit, dataset, self.name, assignment.attempt, storage)

        def say(messages: Sequence[ToDriver]) -> None:
            self._outbox.put(messages)
            exported.update(messages)

        return Worker(
            engine,
            read,
            open_writer,
            say,
            wanted_requests=order.wanted_requests(engine.report.pool_images),
            num_encoders=self._num_encoders,
        )
