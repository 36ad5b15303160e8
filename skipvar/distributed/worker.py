"""The life of units inside a replica: read, mix in the engine, encode and publish, overlapping. Threads, but no Ray.

One thread (`Worker.run`) owns the engine and everything in `Worker`; it acts on what comes in one queue: messages, and
the results of reader, encoders and publishers, which are pools that work on what they are given.
"""

import logging
import queue
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from skipvar.distributed.messages import Assignment, Progress, Stop, Supply, ToDriver, ToReplica, UnitDone
from skipvar.shards.writer import UnitWriter
from skipvar.types import Failure, Image, Request, RequestKey, UnitReport

if TYPE_CHECKING:  # without torch, which a driver does not need
    from skipvar.engine.engine import Engine

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

NUM_PUBLISHERS = 4
"""Uploads at a time: they wait on the network, not on a processor."""
MAX_ENCODING = 64
"""The engine waits while so many results wait for an encoder: their pixels take memory."""


class _Discard:
    """Stands where the worker expects a `UnitWriter`: what an isolation makes is thrown away."""

    def add(self, item: Image | Failure) -> None: ...

    def publish(self) -> None: ...


@dataclass(eq=False)
class _OpenUnit:
    """A unit between being handed out and being published."""

    index: int
    writer: UnitWriter | _Discard
    num_requests: int | None = None
    """None: its rows are being read."""
    made: Counter[str | None] = field(default_factory=Counter)
    """Results that the writer has, by strategy; failures under None."""


class Worker:
    """Feeds units to an engine and publishes what it makes of them.

    Whether a part-full batch runs is the batcher's rule; the worker gives it one fact: whether more is coming.
    """

    def __init__(
        self,
        engine: "Engine",
        read_requests: Callable[[Assignment], Iterable[Request | Failure]],
        open_writer: Callable[[Assignment], UnitWriter],
        say: Callable[[Sequence[ToDriver]], None],
        *,
        wanted_requests: int,
        num_encoders: int = 2,
    ) -> None:
        """`say` takes what the driver is to know, in one go; `wanted_requests` as in `Started`."""
        self._engine = engine
        self._read_requests, self._open_writer, self._say = read_requests, open_writer, say
        self.wanted_requests = wanted_requests
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        """What is to be done by the worker's thread."""
        self._open: set[_OpenUnit] = set()
        self._unit_of: dict[RequestKey, _OpenUnit] = {}
        """Of the requests that the engine has."""
        self._num_steps = self._num_published = self._num_read = 0
        self._is_more_coming, self._is_stopping, self._has_asked, self._supply_number = False, False, False, 0
        self._done: list[UnitDone] = []
        """What the next report takes along."""
        self._reported, self._reported_at, self._report_seconds = Progress(), time.monotonic(), 1.0
        self._reader = ThreadPoolExecutor(1, "reader")
        self._encoders = ThreadPoolExecutor(num_encoders, "encoder")
        self._publishers = ThreadPoolExecutor(NUM_PUBLISHERS, "publisher")
        self._num_in: Counter[Executor] = Counter()
        """What each pool was given and has not brought back."""

    def post(self, message: ToReplica) -> None:
        """Tell the worker something. From any thread."""
        self._inbox.put(partial(self._act, message))

    def run(self) -> None:
        """Work until `Stop`, and until what was complete by then is published. Raises what breaks a unit."""
        try:
            while not self._is_over():
                self._take_messages(wait=not self._can_step())
                if self._can_step():
                    self._step()
                self._report()
        finally:
            if self._done:
                self._say(self._done)
            for pool in (self._reader, self._encoders, self._publishers):
                pool.shutdown(wait=False, cancel_futures=True)

    def _is_over(self) -> bool:
        return self._is_stopping and not self._num_in[self._encoders] and not self._num_in[self._publishers]

    # ---- steps ----

    def _can_step(self) -> bool:
        if self._is_stopping or self._num_in[self._encoders] >= MAX_ENCODING:
            return False
        return self._engine.can_step(flush=not self._expects_more())

    def _step(self) -> None:
        finished = self._engine.step(flush=not self._expects_more())
        self._num_steps += 1
        for item in finished:
            self._store(self._unit_of.pop(item.key if isinstance(item, Failure) else item.request.key), item)

    def _expects_more(self) -> bool:
        """The fact that the batcher's rule asks for. A replica that is well supplied gets nothing more for now."""
        return self._num_in[self._reader] > 0 or (self._is_more_coming and self._num_unfinished < self.wanted_requests)

    @property
    def _num_unfinished(self) -> int:
        return len(self._unit_of)

    # ---- messages ----

    def _take_messages(self, *, wait: bool) -> None:
        """Act on what has arrived; with `wait`, on one at least, or on none once the next report is due."""
        try:
            has_news = self._done or self._progress() != self._reported
            self._inbox.get(block=wait, timeout=self._until_report() if has_news else None)()
            while True:
                self._inbox.get(block=False)()
        except queue.Empty:
            pass

    def _act(self, message: ToReplica) -> None:
        match message:
            case Supply():
                if message.number >= self._supply_number:
                    self._supply_number = message.number
                    self._is_more_coming, self._has_asked = message.is_more_coming, False
                    self._report_seconds = message.report_seconds
                for assignment in message.assignments:
                    self._open_unit(assignment)
            case Stop():
                self._is_stopping = True

    # ---- a unit's way ----

    def _open_unit(self, assignment: Assignment) -> None:
        writer = _Discard() if assignment.is_isolation else self._open_writer(assignment)
        unit = _OpenUnit(assignment.unit.index, writer)
        self._open.add(unit)
        self._in_pool(
            self._reader, lambda: list(self._read_requests(assignment)), lambda items: self._on_read(unit, items)
        )

    def _on_read(self, unit: _OpenUnit, items: Sequence[Request | Failure]) -> None:
        self._num_read += 1
        if self._is_stopping:
            return
        unit.num_requests = len(items)
        requests = [item for item in items if isinstance(item, Request)]
        self._unit_of.update((request.key, unit) for request in requests)
        self._engine.submit(requests)
        for item in items:
            if isinstance(item, Failure):
                self._store(unit, item)
        self._publish_if_complete(unit)

    def _store(self, unit: _OpenUnit, item: Image | Failure) -> None:
        strategy = item.strategy if isinstance(item, Image) else None

        def count(_: None) -> None:  # holds no pixels
            unit.made[strategy] += 1
            self._publish_if_complete(unit)

        self._in_pool(self._encoders, lambda: unit.writer.add(item), count)

    def _publish_if_complete(self, unit: _OpenUnit) -> None:
        if unit.made.total() == unit.num_requests:
            self._in_pool(self._publishers, unit.writer.publish, lambda report: self._on_published(unit, report))

    def _on_published(self, unit: _OpenUnit, report: UnitReport | None) -> None:
        self._open.remove(unit)
        self._done.append(UnitDone(unit=unit.index, report=report))
        if report is not None:
            self._num_published += 1
            logger.info("Unit %d: %d images, %d failures", unit.index, report.num_images, report.num_failures)

    def _in_pool(self, pool: Executor, work: Callable[[], Result], then: Callable[[Result], None]) -> None:
        """Have `work` done in a pool; the worker's thread does `then` with what it gives, or raises what it raised."""

        def bring_back(done: Future[Result]) -> None:
            self._num_in[pool] -= 1
            then(done.result())

        self._num_in[pool] += 1
        pool.submit(work).add_done_callback(lambda done: self._inbox.put(partial(bring_back, done)))

    # ---- what the driver hears ----

    def _report(self) -> None:
        """Tell the driver what is done and how far this is: where it runs low, else after `report_seconds`.

        A driver of a thousand replicas hears of a unit once; it hands out the next with its answer.
        """
        is_low = self._num_unfinished < self.wanted_requests and not self._num_in[self._reader]
        asks = is_low and self._is_more_coming and not self._has_asked
        if not asks and not (is_low and self._done) and self._until_report() > 0:
            return
        progress = self._progress()
        if asks or self._done or progress != self._reported:
            self._has_asked |= asks
            self._say((*self._done, progress))
            self._done.clear()
        self._reported, self._reported_at = progress, time.monotonic()

    def _until_report(self) -> float:
        return max(0.0, self._reported_at + self._report_seconds - time.monotonic())

    def _progress(self) -> Progress:
        made = sum((unit.made for unit in self._open if not isinstance(unit.writer, _Discard)), Counter[str | None]())
        return Progress(
            num_steps=self._num_steps,
            num_published=self._num_published,
            num_read=self._num_read,
            num_unfinished=self._num_unfinished,
            num_failures=made[None],
            strategies={name: count for name, count in made.items() if name is not None},
        )


class ReplicaDiedError(Exception):
    """Stands in the error table for a request that kills its replica."""


def as_assigned(items: Iterable[Request | Failure], assignment: Assignment) -> Iterable[Request | Failure]:
    """The unit's requests as they are to be made, with the poisoned ones as failures."""
    for item in items:
        if isinstance(item, Request) and item.key in assignment.poisoned:
            failure = Failure.of(item, ReplicaDiedError(assignment.poisoned[item.key]))
            yield replace(failure, attempts=assignment.attempt)
        else:
            yield replace(item, must_be_base=True) if assignment.must_be_base and isinstance(item, Request) else item
