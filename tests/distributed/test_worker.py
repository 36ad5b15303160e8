"""A worker mixes units, publishes each once, keeps batches full, and ends in order."""

import threading
import time
from collections.abc import Iterable

import pytest
from fakes import FakeEngine, FakeWriter, make_request

from skipvar.distributed.dispatch import Assignment
from skipvar.distributed.worker import Worker, WorkerStoppedError, fail_poisoned
from skipvar.errors import InputError, StorageError
from skipvar.types import Failure, Image, Request, Unit

ROWS = 10


def assignment(index: int, *, is_trial: bool = False, poisoned: dict[tuple[int, int], str] | None = None) -> Assignment:
    unit = Unit(index=index, first_position=index * ROWS, num_rows=ROWS, slices=())
    return Assignment(unit=unit, attempt=1, is_trial=is_trial, poisoned=poisoned or {})


def read(given: Assignment) -> Iterable[Request | Failure]:
    first = given.unit.first_position
    return fail_poisoned((make_request(first + row) for row in range(given.unit.num_rows)), given)


class Bench:
    """A worker over a fake engine, and what it published."""

    def __init__(
        self, engine: FakeEngine | None = None, read_requests=read, writer=FakeWriter, **options: float
    ) -> None:
        self.engine = engine or FakeEngine()
        self.published: dict[int, list[Image | Failure]] = {}
        settings = {"wanted_requests": 30, "max_open_requests": 120, "grace_seconds": 30.0, **options}
        self.worker = Worker(self.engine, read_requests, lambda given: writer(given, self.published), **settings)

    def run(self, num_units: int) -> None:
        """What a driver does."""
        futures = []
        for index in range(num_units):
            self.worker.want_unit().result(timeout=20)
            futures.append(self.worker.add(assignment(index)))
        self.worker.finish_up()
        for future in futures:
            future.result(timeout=20)


def test_every_request_is_published_once_and_batches_are_full() -> None:
    bench = Bench()
    bench.run(30)
    bench.worker.stop()
    assert sorted(bench.published) == list(range(30))
    for index, items in bench.published.items():
        assert sorted(item.request.position for item in items) == list(range(index * ROWS, (index + 1) * ROWS))
    assert sum(bench.engine.fills) / len(bench.engine.fills) > 0.9 * bench.engine.batch_size


def test_the_engine_is_not_flooded() -> None:
    bench = Bench(FakeEngine(step_seconds=0.2))
    wants = []
    for index in range(5):
        want = bench.worker.want_unit()
        try:
            want.result(timeout=0.05)
        except TimeoutError:
            break
        wants.append(want)
        bench.worker.add(assignment(index))
        time.sleep(0.02)
    assert 3 <= len(wants) <= 4  # 30 requests wanted, 10 a unit
    bench.worker.stop()


def test_part_full_batches_run_after_the_grace() -> None:
    bench = Bench(grace_seconds=0.2)
    started = time.monotonic()
    bench.worker.add(assignment(0)).result(timeout=10)
    assert 0.15 < time.monotonic() - started < 5
    bench.worker.stop()


def test_as_many_open_units_as_may_be_end_the_waiting() -> None:
    bench = Bench(FakeEngine(batch_size=1000), max_open_requests=20)
    first, second = bench.worker.add(assignment(0)), bench.worker.add(assignment(1))
    assert first.result(timeout=10) and second.result(timeout=10)
    bench.worker.stop()


def test_a_trial_publishes_nothing() -> None:
    bench = Bench()
    future = bench.worker.add(assignment(0, is_trial=True))
    bench.worker.finish_up()
    assert future.result(timeout=10) is None
    assert bench.published == {}
    bench.worker.stop()


def test_poisoned_requests_are_failures_in_their_unit() -> None:
    bench = Bench()
    future = bench.worker.add(assignment(0, poisoned={(3, 0): "it kills"}))
    bench.worker.finish_up()
    report = future.result(timeout=10)
    assert report is not None and (report.num_images, report.num_failures) == (9, 1)
    [failure] = [item for item in bench.published[0] if isinstance(item, Failure)]
    assert (failure.position, failure.error_class, failure.message) == (3, "ReplicaDiedError", "it kills")
    bench.worker.stop()


def test_a_unit_of_bad_rows_alone_is_published() -> None:
    def read_bad(given: Assignment) -> Iterable[Request | Failure]:
        for request in read(given):
            assert isinstance(request, Request)
            yield Failure.of(request, ValueError("bad"))

    bench = Bench(read_requests=read_bad)
    report = bench.worker.add(assignment(0)).result(timeout=10)
    assert report is not None and report.num_failures == ROWS
    bench.worker.stop()


def test_an_empty_unit_is_published() -> None:
    bench = Bench(read_requests=lambda given: [])
    report = bench.worker.add(assignment(0)).result(timeout=10)
    assert report is not None and report.num_images == 0
    bench.worker.stop()


def test_stopping_publishes_nothing_partial() -> None:
    bench = Bench(FakeEngine(batch_size=1, step_seconds=0.05))
    future = bench.worker.add(assignment(0))
    time.sleep(0.2)
    bench.worker.stop()
    with pytest.raises(WorkerStoppedError):
        future.result(timeout=1)
    assert bench.published == {}


def test_progress_counts_what_is_made_but_not_published() -> None:
    bench = Bench(FakeEngine(batch_size=1, step_seconds=0.05))
    future = bench.worker.add(assignment(0))
    time.sleep(0.25)
    assert 1 <= sum(bench.worker.progress().strategies.values()) < ROWS
    future.result(timeout=10)
    assert bench.worker.progress().strategies == {}
    bench.worker.stop()


@pytest.mark.parametrize("where", ["read", "engine", "publish"])
def test_an_error_ends_every_open_unit_with_it(where: str) -> None:
    class FullDisk(FakeWriter):
        def publish(self):
            raise StorageError("full")

    def read_gone(given: Assignment) -> Iterable[Request | Failure]:
        raise InputError("gone")

    def read_raise(given: Assignment) -> Iterable[Request | Failure]:
        return [make_request(0, "raise")]

    readers = {"read": read_gone, "engine": read_raise, "publish": read}
    bench = Bench(read_requests=readers[where], writer=FullDisk if where == "publish" else FakeWriter)
    future = bench.worker.add(assignment(0))
    bench.worker.finish_up()
    expected = {"read": InputError, "engine": RuntimeError, "publish": StorageError}[where]
    with pytest.raises(expected):
        future.result(timeout=10)
    with pytest.raises(expected):
        bench.worker.add(assignment(1)).result(timeout=10)
    with pytest.raises(expected):
        bench.worker.want_unit().result(timeout=10)
    bench.worker.stop()


def test_a_slow_upload_does_not_stop_the_engine() -> None:
    gate = threading.Event()

    class Slow(FakeWriter):
        def publish(self):
            gate.wait(20)
            return super().publish()

    bench = Bench(writer=Slow)
    futures = [bench.worker.add(assignment(index)) for index in range(3)]
    bench.worker.finish_up()
    deadline = time.monotonic() + 10
    while sum(bench.engine.fills) < 3 * ROWS and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sum(bench.engine.fills) == 3 * ROWS
    assert not any(future.done() for future in futures)
    gate.set()
    assert all(future.result(timeout=10) for future in futures)
    bench.worker.stop()
