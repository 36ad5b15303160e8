"""A worker mixes units, publishes each once, keeps batches full, and ends in order."""

import queue
import threading
import time
from collections.abc import Iterable, Sequence

import pytest
from fakes import FakeEngine, FakeWriter, make_request
from twin import make_units

from skipvar.distributed.messages import Assignment, Progress, Stop, Supply, ToDriver, UnitDone
from skipvar.distributed.worker import Worker, as_assigned
from skipvar.errors import InputError, StorageError
from skipvar.types import Failure, Image, Request, Unit, UnitReport

ROWS = 10
WANTED = 30


def assignment(
    index: int, *, is_isolation: bool = False, poisoned: dict[tuple[int, int], str] | None = None
) -> Assignment:
    unit = Unit(index=index, first_position=index * ROWS, num_rows=ROWS, slices=())
    return Assignment(unit=unit, attempt=1, is_isolation=is_isolation, poisoned=poisoned or {})


def read(given: Assignment) -> Iterable[Request | Failure]:
    first = given.unit.first_position
    return as_assigned((make_request(first + row) for row in range(given.unit.num_rows)), given)


def read_some_bad(given: Assignment) -> Iterable[Request | Failure]:
    for row, item in enumerate(read(given)):
        assert isinstance(item, Request)
        yield Failure.of(item, ValueError("bad")) if row % 3 == 0 else item


class Bench:
    """A worker over a fake engine on a thread of its own, and what it says and publishes."""

    def __init__(self, engine: FakeEngine | None = None, read_requests=read, writer=FakeWriter) -> None:
        self.engine = engine or FakeEngine()
        self.published: dict[int, list[Image | Failure]] = {}
        self.reports: list[Sequence[ToDriver]] = []
        self.said: queue.Queue[ToDriver] = queue.Queue()
        self.error: Exception | None = None
        self.worker = Worker(
            self.engine,
            read_requests,
            lambda given: writer(given, self.published),
            self._say,
            wanted_requests=WANTED,
        )
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _say(self, messages: Sequence[ToDriver]) -> None:
        self.reports.append(tuple(messages))
        for message in messages:
            self.said.put(message)

    def _run(self) -> None:
        try:
            self.worker.run()
        except Exception as error:
            self.error = error

    def supply(self, *assignments: Assignment, more: bool = False) -> None:
        self.worker.post(Supply(assignments=assignments, is_more_coming=more))

    def wait_for(self, kind: type, timeout: float = 20.0) -> ToDriver:
        """The next message of a kind; others before it are let go."""
        while not isinstance(message := self.said.get(timeout=timeout), kind):
            pass
        return message

    def done(self, count: int = 1) -> list[UnitReport | None]:
        messages = [self.wait_for(UnitDone) for _ in range(count)]
        return [message.report for message in messages if isinstance(message, UnitDone)]

    def stop(self) -> None:
        self.worker.post(Stop())
        self.thread.join(timeout=60)
        assert not self.thread.is_alive()

    def run(self, num_units: int) -> None:
        """What a driver does: more whenever the worker runs low, and word when that is all."""
        left = [assignment(index) for index in range(num_units)]
        num_done = 0
        self.supply(*(left.pop(0) for _ in range(min(3, len(left)))), more=bool(left))
        while num_done < num_units:
            message = self.said.get(timeout=60)
            num_done += isinstance(message, UnitDone)
            if isinstance(message, Progress) and left and message.num_unfinished < WANTED:
                self.supply(left.pop(0), more=bool(left))


def test_every_request_is_published_once_and_batches_are_full() -> None:
    bench = Bench()
    bench.run(30)
    bench.stop()
    assert sorted(bench.published) == list(range(30))
    for index, items in bench.published.items():
        assert sorted(item.request.position for item in items) == list(range(index * ROWS, (index + 1) * ROWS))
    assert sum(bench.engine.fills) / len(bench.engine.fills) > 0.9 * bench.engine.batch_size


@pytest.mark.parametrize("read_requests", [read, read_some_bad])
def test_the_same_as_its_plain_twin(read_requests) -> None:
    bench = Bench(read_requests=read_requests)
    bench.run(12)
    bench.stop()
    published: dict[int, list[Image | Failure]] = {}
    make_units(FakeEngine(), read_requests, lambda given: FakeWriter(given, published), map(assignment, range(12)))

    def content(units: dict[int, list[Image | Failure]]) -> dict[int, list[object]]:
        seen = {
            index: sorted(
                (item.key, "failed", b"") if isinstance(item, Failure)
                else (item.request.key, item.strategy, item.pixels.tobytes())
                for item in items
            )
            for index, items in units.items()
        }  # fmt: skip
        return {index: list(items) for index, items in seen.items()}

    assert content(bench.published) == content(published)


def test_it_waits_for_company_while_more_is_coming() -> None:
    bench = Bench(FakeEngine(batch_size=1000))
    bench.supply(assignment(0), more=True)
    assert isinstance(asked := bench.wait_for(Progress), Progress) and asked.num_unfinished == ROWS
    time.sleep(0.2)
    assert bench.engine.fills == []
    bench.supply(more=False)
    assert bench.done() == [report for report in [bench_report(bench, 0)] if report]
    bench.stop()


def bench_report(bench: Bench, index: int) -> UnitReport:
    """What the bench's writer would say of a unit."""
    writer = FakeWriter(assignment(index), {})
    writer.items = bench.published[index]
    return writer.publish()


def test_well_supplied_it_does_not_wait() -> None:
    """As much as it wanted, and no batch full: nothing more comes before a step."""
    bench = Bench(FakeEngine(batch_size=1000))
    bench.supply(*(assignment(index) for index in range(3)), more=True)
    bench.wait_for(Progress)
    assert bench.engine.fills
    bench.supply(more=False)
    assert len(bench.done(3)) == 3
    bench.stop()


def test_it_asks_once_when_it_runs_low() -> None:
    bench = Bench(FakeEngine(batch_size=1000))
    bench.supply(assignment(0), more=True)
    time.sleep(0.3)
    asked = [bench.said.get_nowait() for _ in range(bench.said.qsize())]
    assert len(asked) == 1 and isinstance(asked[0], Progress)
    bench.stop()


def test_a_well_supplied_worker_is_heard_when_it_runs_low_and_tells_all_in_one_go() -> None:
    bench = Bench(FakeEngine(step_seconds=0.02))
    units = tuple(assignment(index) for index in range(10))
    bench.worker.post(Supply(assignments=units, is_more_coming=True, report_seconds=60.0))
    report = bench.wait_for(Progress)
    assert isinstance(report, Progress) and report.num_unfinished < WANTED
    [first] = bench.reports[:1]
    assert first[-1] == report and report.num_published == len(first) - 1 > 0
    bench.supply(more=False)
    bench.done(len(units) - report.num_published)
    bench.stop()


def test_an_earlier_word_that_arrives_later_does_not_hold() -> None:
    bench = Bench(FakeEngine(batch_size=1000))
    bench.worker.post(Supply(assignments=(assignment(0),), is_more_coming=False, number=2))
    bench.worker.post(Supply(assignments=(assignment(1),), is_more_coming=True, number=1))
    assert len(bench.done(2)) == 2, "the batch does not wait for company"
    bench.stop()


def test_what_is_done_is_told_before_the_end() -> None:
    gate = threading.Event()
    bench = Bench(writer=slow_until(gate))
    bench.worker.post(Supply(assignments=(assignment(0),), is_more_coming=False))
    bench.wait_for(Progress)
    bench.worker.post(Supply(assignments=tuple(map(assignment, range(1, 20))), is_more_coming=True, report_seconds=60))
    bench.worker.post(Stop())
    gate.set()
    bench.thread.join(timeout=60)
    assert 0 in {message.unit for report in bench.reports for message in report if isinstance(message, UnitDone)}


def test_an_isolation_publishes_nothing() -> None:
    bench = Bench()
    bench.supply(assignment(0, is_isolation=True))
    assert bench.done() == [None]
    assert bench.published == {}
    bench.stop()


def test_poisoned_requests_are_failures_in_their_unit() -> None:
    bench = Bench()
    bench.supply(assignment(0, poisoned={(3, 0): "it kills"}))
    [report] = bench.done()
    assert report is not None and (report.num_images, report.num_failures) == (9, 1)
    [failure] = [item for item in bench.published[0] if isinstance(item, Failure)]
    assert (failure.position, failure.error_class, failure.message) == (3, "ReplicaDiedError", "it kills")
    bench.stop()


def test_a_unit_of_bad_rows_alone_is_published() -> None:
    def read_bad(given: Assignment) -> Iterable[Request | Failure]:
        for request in read(given):
            assert isinstance(request, Request)
            yield Failure.of(request, ValueError("bad"))

    bench = Bench(read_requests=read_bad)
    bench.supply(assignment(0))
    [report] = bench.done()
    assert report is not None and report.num_failures == ROWS
    bench.stop()


def test_an_empty_unit_is_published() -> None:
    bench = Bench(read_requests=lambda given: [])
    bench.supply(assignment(0))
    [report] = bench.done()
    assert report is not None and report.num_images == 0
    bench.stop()


class OneThreadEngine(FakeEngine):
    """Breaks, as a real one may, when another thread looks into it while its own changes it."""

    owner: int | None = None

    def check(self) -> None:
        self.owner = self.owner or threading.get_ident()
        if self.owner != threading.get_ident():
            raise RuntimeError("dictionary changed size during iteration")

    @property
    def num_pending(self) -> int:
        self.check()
        return super().num_pending

    def can_step(self, *, flush: bool = False) -> bool:
        self.check()
        return super().can_step(flush=flush)

    def submit(self, requests: Sequence[Request]) -> None:
        self.check()
        super().submit(requests)


def test_only_one_thread_looks_into_the_engine() -> None:
    bench = Bench(OneThreadEngine(), read_requests=read_some_bad)
    bench.run(10)
    bench.stop()
    assert sorted(bench.published) == list(range(10)) and bench.error is None


def test_stopping_publishes_nothing_partial() -> None:
    bench = Bench(FakeEngine(batch_size=1, step_seconds=0.05))
    bench.supply(assignment(0))
    time.sleep(0.2)
    bench.stop()
    assert bench.published == {} and bench.error is None


def test_progress_counts_what_is_made_but_not_published() -> None:
    bench = Bench(FakeEngine(batch_size=1, step_seconds=0.15))
    bench.supply(assignment(0))
    progress = bench.wait_for(Progress)
    assert isinstance(progress, Progress)
    assert 1 <= sum(progress.strategies.values()) < ROWS and 1 <= progress.num_steps < ROWS
    assert progress.num_unfinished < ROWS and (progress.num_read, progress.num_published) == (1, 0)
    bench.done()
    progress = bench.wait_for(Progress)
    assert isinstance(progress, Progress)
    assert progress.strategies == {} and progress.num_published == 1 and progress.num_unfinished == 0
    bench.stop()


@pytest.mark.parametrize("where", ["read", "engine", "publish"])
def test_an_error_ends_the_worker_with_it(where: str) -> None:
    class FullDisk(FakeWriter):
        def publish(self):
            raise StorageError("full")

    def read_gone(given: Assignment) -> Iterable[Request | Failure]:
        raise InputError("gone")

    def read_raise(given: Assignment) -> Iterable[Request | Failure]:
        return [make_request(0, "raise")]

    readers = {"read": read_gone, "engine": read_raise, "publish": read}
    bench = Bench(read_requests=readers[where], writer=FullDisk if where == "publish" else FakeWriter)
    bench.supply(assignment(0))
    bench.thread.join(timeout=10)
    assert not bench.thread.is_alive()
    assert isinstance(bench.error, {"read": InputError, "engine": RuntimeError, "publish": StorageError}[where])
    assert bench.said.empty()


def slow_until(gate: threading.Event) -> type[FakeWriter]:
    """A writer that publishes once the gate is open."""

    class Slow(FakeWriter):
        def publish(self):
            gate.wait(20)
            return super().publish()

    return Slow


def test_a_slow_upload_does_not_stop_the_engine() -> None:
    gate = threading.Event()
    bench = Bench(writer=slow_until(gate))
    bench.supply(*(assignment(index) for index in range(3)))
    deadline = time.monotonic() + 10
    while sum(bench.engine.fills) < 3 * ROWS and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sum(bench.engine.fills) == 3 * ROWS
    assert bench.published == {}
    gate.set()
    assert all(bench.done(3))
    bench.stop()


def test_what_is_complete_when_it_is_stopped_is_published() -> None:
    gate = threading.Event()
    bench = Bench(writer=slow_until(gate))
    bench.supply(assignment(0))
    while sum(bench.engine.fills) < ROWS:
        time.sleep(0.01)
    bench.worker.post(Stop())
    threading.Timer(0.2, gate.set).start()
    bench.stop()
    assert list(bench.published) == [0]
