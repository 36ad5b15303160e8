"""The dispatcher finds the request that kills replicas, and hands every unit out until it is published."""

import random
from collections.abc import Iterator

import pytest

from skipvar.distributed.dispatch import Dispatcher
from skipvar.distributed.messages import Assignment
from skipvar.errors import StoppedError
from skipvar.types import RequestKey, Unit


def units(num_units: int, rows: int = 10) -> Iterator[Unit]:
    for index in range(num_units):
        yield Unit(index=index, first_position=index * rows, num_rows=rows, slices=())


def made(assignment: Assignment, images_per_prompt: int = 1) -> set[RequestKey]:
    """What a replica would make of an assignment."""
    unit = assignment.unit
    keys = unit.only
    if keys is None:
        rows = range(unit.first_position, unit.first_position + unit.num_rows)
        keys = frozenset((position, image) for position in rows for image in range(images_per_prompt))
    return set(keys) - set(assignment.poisoned)


def run(dispatcher: Dispatcher, deadly: set[RequestKey], num_in_flight: int = 2) -> tuple[dict[int, Assignment], int]:
    """Play a replica with several units in flight that dies of deadly requests: what was published, and the deaths."""
    published: dict[int, Assignment] = {}
    deaths = 0
    for _ in range(1000):
        flight: list[Assignment] = []
        while len(flight) < num_in_flight and not any(assignment.is_alone for assignment in flight):
            assignment = dispatcher.next("it")
            if assignment is None:
                break
            flight.append(assignment)
        if any(made(assignment, 2) & deadly for assignment in flight):
            deaths += 1
            dispatcher.lost("it", is_preempted=False)
        else:
            for assignment in flight:
                if not assignment.is_isolation:
                    assert assignment.unit.index not in published, "published twice"
                    published[assignment.unit.index] = assignment
                dispatcher.finished("it", assignment.unit.index)
        if dispatcher.is_done:
            return published, deaths
    raise AssertionError("the dispatcher never comes to an end")


def test_every_unit_is_handed_out_once() -> None:
    published, deaths = run(Dispatcher(units(5), max_attempts=3, images_per_prompt=2), set())
    assert sorted(published) == [0, 1, 2, 3, 4]
    assert deaths == 0


@pytest.mark.parametrize("deadly", [{(0, 0)}, {(14, 1)}, {(29, 1)}, {(11, 0), (12, 1)}, {(3, 0), (13, 0), (23, 1)}])
def test_requests_at_fault_are_found_and_only_they(deadly: set[RequestKey]) -> None:
    published, _ = run(Dispatcher(units(3), max_attempts=3, images_per_prompt=2), deadly)
    assert sorted(published) == [0, 1, 2]
    assert {key for assignment in published.values() for key in assignment.poisoned} == deadly
    assert all(assignment.unit.only is None for assignment in published.values())


def test_a_unit_that_was_only_a_neighbour_is_cleared() -> None:
    published, _ = run(Dispatcher(units(2), max_attempts=2, images_per_prompt=2), {(0, 0)})
    assert published[1].poisoned == {}


def test_preemption_does_not_count() -> None:
    dispatcher = Dispatcher(units(1), max_attempts=1, images_per_prompt=1)
    for _ in range(20):
        assignment = dispatcher.next("it")
        assert assignment is not None
        assert not assignment.is_alone
        dispatcher.lost("it", is_preempted=True)
    assert dispatcher.has_work


def test_deaths_that_no_request_explains_end_the_run() -> None:
    dispatcher = Dispatcher(units(1), max_attempts=2, images_per_prompt=1)
    with pytest.raises(StoppedError, match="none of its requests"):
        for _ in range(1000):
            assignment = dispatcher.next("it")
            assert assignment is not None
            if assignment.is_isolation:  # dies only when the whole unit runs
                dispatcher.finished("it", assignment.unit.index)
            else:
                dispatcher.lost("it", is_preempted=False)


def storm(dispatcher: Dispatcher, deadly: set[RequestKey], share: float, seed: int) -> dict[int, Assignment]:
    """Play four replicas with two units in flight each, of which something outside kills a `share` at every turn."""
    rng = random.Random(seed)
    published: dict[int, Assignment] = {}
    for turn in range(100_000):
        replica = f"replica {turn % 4}"
        while len(dispatcher.held_by(replica)) < 2 and not dispatcher.is_reserved(replica):
            if dispatcher.next(replica) is None:
                break
        held = list(dispatcher.held_by(replica).values())
        if rng.random() < share or any(made(assignment) & deadly for assignment in held):
            dispatcher.lost(replica, is_preempted=False)
            continue
        for assignment in held:
            if not assignment.is_isolation:
                published[assignment.unit.index] = assignment
            dispatcher.finished(replica, assignment.unit.index)
        if dispatcher.is_done:
            return published
    raise AssertionError("the dispatcher never comes to an end")


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
@pytest.mark.parametrize("deadly", [set(), {(95, 0), (1207, 0)}], ids=["none", "two"])
def test_kills_from_outside_are_no_units_fault(share: float, deadly: set[RequestKey]) -> None:
    for seed in range(10):
        published = storm(Dispatcher(units(250), max_attempts=3, images_per_prompt=1), deadly, share, seed)
        assert sorted(published) == list(range(250))
        assert {key for assignment in published.values() for key in assignment.poisoned} == deadly


def test_a_suspect_waits_for_an_idle_replica() -> None:
    dispatcher = Dispatcher(units(2), max_attempts=1, images_per_prompt=1)
    assert dispatcher.next("dying") is not None
    assert dispatcher.next("busy") is not None
    dispatcher.lost("dying", is_preempted=False)
    assert dispatcher.next("busy") is None
    assert dispatcher.has_work and list(dispatcher.held_by("busy")) == [1]
    alone = dispatcher.next("idle")
    assert alone is not None and alone.is_alone
    assert dispatcher.is_reserved("idle") and not dispatcher.is_reserved("busy")
