"""The life of units inside a replica: read, mix in the engine, encode and publish, overlapping. Threads, but no Ray."""

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from skipvar.distributed.dispatch import Assignment
from skipvar.types import Failure, Image, Request, RequestKey, UnitReport

logger = logging.getLogger(__name__)

_FAILED = ""
"""Key of the failures among the counted strategies."""

NUM_PUBLISHERS = 4
"""Uploads at a time: they wait on the network, not on a processor."""


class Engine(Protocol):
    """What a worker needs of `skipvar.engine.engine.Engine`."""

    @property
    def num_pending(self) -> int: ...

    def submit(self, requests: Sequence[Request]) -> None: ...

    def can_step(self, flush: bool = False) -> bool: ...

    def step(self, flush: bool = False) -> list[Image | Failure]: ...


class Writer(Protocol):
    """What a worker needs of `skipvar.shards.writer.UnitWriter`; `add` is called from several threads."""

    def add(self, item: Image | Failure) -> None: ...

    def publish(self) -> UnitReport: ...


class WorkerStoppedError(Exception):
    """The worker was told to stop before this unit was complete; nothing of it is published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a worker holds that is made but not published; to be added to the published units' reports."""

    num_failures: int
    strategies: dict[str, int]
    """Images under each strategy."""


@dataclass(eq=False)
class _OpenUnit:
    """A unit between being handed out and being published."""

    assignment: Assignment
    future: "Future[UnitReport | None]"
    writer: Writer | None = None
    num_requests: int = 0
    made: Counter[str] = field(default_factory=Counter)
    """Results that the writer has, by strategy."""


class Worker:
    """Feeds units to an engine on one thread; reading, encoding and publishing overlap it on others.

    Part-full batches run only when nothing else can and no more work is to come: because the driver said so
    (`finish_up`), because as many units are open as may be, or because none came within `grace_seconds`.
    """

    def __init__(
        self,
        engine: Engine,
        read_requests: Callable[[Assignment], Iterable[Request | Failure]],
        open_writer: Callable[[Assignment], Writer],
        *,
        wanted_requests: int,
        max_open_requests: int,
        grace_seconds: float = 2.0,
        num_encoders: int = 2,
    ) -> None:
        """Units are asked for while the engine has fewer than `wanted_requests`, and fewer than `max_open_requests` are
        open (made or not, but unpublished)."""
        self._engine = engine
        self._read_requests = read_requests
        self._open_writer = open_writer
        self._wanted_requests = wanted_requests
        self._max_open_requests = max_open_requests
        self._grace_seconds = grace_seconds
        self._ready: queue.SimpleQueue[tuple[_OpenUnit, list[Request]] | None] = queue.SimpleQueue()
        self._open: dict[int, _OpenUnit] = {}
        self._unit_of: dict[RequestKey, _OpenUnit] = {}
        self._wants: list[Future[None]] = []
        self._lock = threading.Lock()
        self._num_being_read = 0
        self._num_unsubmitted = 0
        self._is_finishing = False
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._asked_at = time.monotonic()
        self._reader = ThreadPoolExecutor(1, "reader")
        self._encoders = ThreadPoolExecutor(num_encoders, "encoder")
        self._publishers = ThreadPoolExecutor(NUM_PUBLISHERS, "publisher")
        self._encoder_slots = threading.BoundedSemaphore(64)
        """Pixels that wait for an encoder: the engine waits beyond so many images, memory stays bounded."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def add(self, assignment: Assignment) -> "Future[UnitReport | None]":
        """Take a unit on; the future gives its report (None for a trial) once it is published."""
        unit = _OpenUnit(assignment, Future())
        with self._lock:
            if self._error is not None:
                unit.future.set_exception(self._error)
                return unit.future
            self._open[assignment.unit.index] = unit
            self._num_being_read += 1
            self._is_finishing = False
        self._reader.submit(self._read, unit)
        return unit.future

    def want_unit(self) -> "Future[None]":
        """A future that is done as soon as another unit is welcome."""
        future: Future[None] = Future()
        with self._lock:
            if self._error is not None:
                future.set_exception(self._error)
                return future
            self._wants.append(future)
        self._answer_wants()
        return future

    def finish_up(self) -> None:
        """Nothing more is to come for now: part-full batches may run."""
        self._is_finishing = True
        self._ready.put(None)

    def progress(self) -> Progress:
        with self._lock:
            made = sum((unit.made for unit in self._open.values() if not unit.assignment.is_trial), Counter[str]())
        num_failures = made.pop(_FAILED, 0)
        return Progress(num_failures=num_failures, strategies=dict(made))

    def stop(self) -> None:
        """End after the current step; units being published finish, the others end with `WorkerStoppedError`."""
        self._stop.set()
        self._ready.put(None)
        self._thread.join()
        self._reader.shutdown(cancel_futures=True)
        self._encoders.shutdown()
        self._publishers.shutdown()
        self._fail_open(WorkerStoppedError("The replica was told to stop."))

    # ---- threads: one reader, one engine, several encoders, several publishers ----

    def _read(self, unit: _OpenUnit) -> None:
        try:
            unit.writer = None if unit.assignment.is_trial else self._open_writer(unit.assignment)
            items = list(self._read_requests(unit.assignment))
        except Exception as error:
            self._fail_open(error)
            return
        requests = [item for item in items if isinstance(item, Request)]
        unit.num_requests = len(items)
        for request in requests:
            self._unit_of[request.key] = unit
        with self._lock:
            self._num_being_read -= 1
            self._num_unsubmitted += len(requests)
        self._ready.put((unit, requests))
        self._answer_wants()
        for item in items:
            if isinstance(item, Failure):
                self._encoders.submit(self._settle, unit, item, None)
        if not items:
            self._publishers.submit(self._publish, unit)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._take_ready(wait=not self._can_step())
                if self._can_step():
                    for item in self._engine.step(flush=not self._engine.can_step()):
                        self._deliver(item)
                self._answer_wants()
        except Exception as error:
            logger.exception("The engine failed")
            self._fail_open(error)

    def _can_step(self) -> bool:
        return self._engine.can_step() or (self._may_flush() and self._engine.can_step(flush=True))

    def _take_ready(self, *, wait: bool) -> None:
        """Submit what the reader has ready; with `wait`, until something comes or the grace is over."""
        timeout = self._grace_seconds if self._engine.num_pending else None
        try:
            ready = self._ready.get(block=wait, timeout=timeout)
            while True:
                if ready is not None:
                    self._engine.submit(ready[1])
                    with self._lock:
                        self._num_unsubmitted -= len(ready[1])
                    self._asked_at = time.monotonic()
                ready = self._ready.get(block=False)
        except queue.Empty:
            pass

    def _may_flush(self) -> bool:
        if self._num_being_read or not self._ready.empty():
            return False
        if self._is_finishing or self._num_open_requests() >= self._max_open_requests:
            return True
        return time.monotonic() - self._asked_at >= self._grace_seconds

    def _deliver(self, item: Image | Failure) -> None:
        unit = self._unit_of.pop(item.key if isinstance(item, Failure) else item.request.key)
        self._encoder_slots.acquire()
        self._encoders.submit(self._settle, unit, item, self._encoder_slots)

    def _settle(self, unit: _OpenUnit, item: Image | Failure, slots: threading.Semaphore | None) -> None:
        """Give a result to its unit's writer; the last one publishes the unit."""
        try:
            if unit.writer is not None:
                unit.writer.add(item)
            with self._lock:
                unit.made[item.strategy if isinstance(item, Image) else _FAILED] += 1
                is_complete = unit.made.total() == unit.num_requests
            if is_complete:
                self._publishers.submit(self._publish, unit)
        except Exception as error:
            self._fail_open(error)
        finally:
            if slots is not None:
                slots.release()

    def _publish(self, unit: _OpenUnit) -> None:
        try:
            report = None if unit.writer is None else unit.writer.publish()
        except Exception as error:
            self._fail_open(error)
            return
        with self._lock:
            self._open.pop(unit.assignment.unit.index, None)
        if report is not None:
            logger.info("Unit %d: %d images, %d failures", report.unit, report.num_images, report.num_failures)
        unit.future.set_result(report)
        self._answer_wants()

    # ---- shared state ----

    def _num_open_requests(self) -> int:
        with self._lock:
            return sum(unit.num_requests for unit in self._open.values())

    def _answer_wants(self) -> None:
        num_waiting = self._engine.num_pending + self._num_unsubmitted
        if self._num_being_read or num_waiting >= self._wanted_requests:
            return
        if self._num_open_requests() >= self._max_open_requests:
            return
        with self._lock:
            wants, self._wants = self._wants, []
        if wants:
            self._asked_at = time.monotonic()
        for future in wants:
            future.set_result(None)

    def _fail_open(self, error: BaseException) -> None:
        """End every open unit with this error; the worker takes no more."""
        with self._lock:
            self._error = self._error or error
            self._stop.set()
            units, self._open = list(self._open.values()), {}
            wants, self._wants = self._wants, []
        futures: list[Future[Any]] = [*(unit.future for unit in units), *wants]
        for future in futures:
            if not future.done():
                future.set_exception(error)


class ReplicaDiedError(Exception):
    """Stands in the error table for a request that kills its replica."""


def fail_poisoned(items: Iterable[Request | Failure], assignment: Assignment) -> Iterable[Request | Failure]:
    """The unit's requests, with the poisoned ones as failures."""
    for item in items:
        if isinstance(item, Request) and item.key in assignment.poisoned:
            failure = Failure.of(item, ReplicaDiedError(assignment.poisoned[item.key]))
            yield replace(failure, attempts=assignment.attempt)
        else:
            yield item
