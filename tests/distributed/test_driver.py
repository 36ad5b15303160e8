"""The driver's loop against a fleet that is played, without Ray: who gets what, when it ends, when it gives up."""

import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from skipvar.config import ClusterConfig, ReplicasConfig, RunConfig
from skipvar.distributed.dispatch import Assignment
from skipvar.distributed.driver import Driver, start_first_replica
from skipvar.distributed.fleet import Event, Member, ReplicaLost
from skipvar.distributed.metrics import Metrics
from skipvar.distributed.stopping import StopSignal
from skipvar.errors import ModelError, StoppedError, StorageError
from skipvar.types import Unit, UnitReport

ROWS = 4
FACTS = {"weights_sha256": {"a": "1"}, "model_config_sha256": "2", "policy_sha256": "3", "dtype": "x", "num_scales": 3}
LOST = ReplicaLost("the process died", is_preempted=False)


class PlayedFleet:
    """Answers one call at a time, in random order; `play` says how a call ends."""

    def __init__(self, play: Callable[[Member, str, Any], Any], seed: int = 0) -> None:
        self.play = play
        self.members: list[Member] = []
        self.calls: list[tuple[Member, str, Any]] = []
        self.created = 0
        self.published: list[int] = []
        self.most_in_flight: dict[str, int] = {}
        self.random = random.Random(seed)

    def grow(self, size: int) -> None:
        while len(self.members) < size:
            self.members.append(Member(f"replica-{self.created}", None))
            self.created += 1

    def call(self, member: Member, method: str, argument: Any = None, *more: Any) -> None:
        if method not in ("progress", "finish_up"):
            self.calls.append((member, method, argument))

    def events(self, timeout_seconds: float) -> Iterator[Event]:
        ready = [call for call in self.calls if call[1] != "want_unit" or len(call[0].in_flight) < 3]
        if not ready:
            return
        call = self.random.choice(ready)
        self.calls.remove(call)
        member, method, argument = call
        self.most_in_flight[member.name] = max(self.most_in_flight.get(member.name, 0), len(member.in_flight))
        result = self.play(member, method, argument)
        if method == "run" and isinstance(result, UnitReport):
            self.published.append(result.unit)
        yield Event(member, method, argument, result)

    def drop(self, member: Member) -> None:
        self.members.remove(member)
        self.calls = [call for call in self.calls if call[0] is not member]


def report(assignment: Assignment, num_failures: int = 0) -> UnitReport:
    return UnitReport(
        unit=assignment.unit.index,
        num_images=ROWS - num_failures,
        num_failures=num_failures,
        num_bytes=0,
        content_hash="",
        already_there=False,
        same_content=True,
        strategies={"base": ROWS - num_failures},
        seconds=0.0,
    )


def play_well(member: Member, method: str, argument: Any) -> Any:
    if method == "start":
        return FACTS
    if method == "run":
        return None if argument.is_trial else report(argument)
    return None


def drive(
    play: Callable[[Member, str, Any], Any] = play_well,
    *,
    num_units: int = 12,
    replicas: ReplicasConfig | None = None,
    room: int = 3,
    seed: int = 0,
    stop: StopSignal | None = None,
    **settings: Any,
) -> tuple[PlayedFleet, Driver]:
    """Run to the end; the fleet with what it published, and the driver."""
    config = RunConfig(cluster=ClusterConfig(replicas=replicas or ReplicasConfig()), **settings)
    fleet = PlayedFleet(play, seed)
    stop = stop or StopSignal()
    units = (Unit(index=n, first_position=n * ROWS, num_rows=ROWS, slices=()) for n in range(num_units))
    run = SimpleNamespace(
        units=units, num_units=num_units, description=FACTS, unit_requests=ROWS, order=lambda: "the order"
    )
    metrics = Metrics(num_units * ROWS, 0)
    driver = Driver(config, fleet, lambda: room, run, metrics, stop)  # type: ignore[arg-type]
    first, _ = start_first_replica(fleet, config, stop)  # type: ignore[arg-type]
    driver.run(first)
    return fleet, driver


@pytest.mark.parametrize("seed", range(10))
def test_every_unit_is_published_once_and_shared_out(seed: int) -> None:
    fleet, _ = drive(seed=seed, num_units=6)
    assert sorted(fleet.published) == list(range(6))
    assert fleet.created == 3
    assert max(fleet.most_in_flight.values()) <= 2  # a third of what is left, however fast the first one asks


@pytest.mark.parametrize("seed", range(20))
def test_random_deaths_lose_nothing(seed: int) -> None:
    dice = random.Random(seed)

    def play(member: Member, method: str, argument: Any) -> Any:
        if dice.random() < 0.1:
            return ReplicaLost("gone", is_preempted=dice.random() < 0.5)
        return play_well(member, method, argument)

    fleet, _ = drive(play, num_units=30, seed=seed, max_attempts=10)
    assert sorted(fleet.published) == list(range(30))


@pytest.mark.parametrize("seed", range(10))
def test_a_deadly_request_is_the_only_one_given_up(seed: int) -> None:
    deadly, given_up = (22, 0), []

    def play(member: Member, method: str, argument: Any) -> Any:
        if method == "run":
            unit = argument.unit
            keys = unit.only or {(unit.first_position + row, 0) for row in range(ROWS)}
            if deadly in set(keys) - set(argument.poisoned):
                return LOST
            given_up.extend(argument.poisoned)
        return play_well(member, method, argument)

    fleet, _ = drive(play, seed=seed)
    assert sorted(fleet.published) == list(range(12))
    assert given_up == [deadly]


def test_a_machine_that_kills_every_replica_at_work_ends_the_run() -> None:
    with pytest.raises(StoppedError, match="replicas in a row died"):
        drive(lambda member, method, argument: LOST if method == "run" else play_well(member, method, argument))


def test_a_bad_node_beside_good_ones_does_not_end_the_run() -> None:
    def play(member: Member, method: str, argument: Any) -> Any:
        if method == "open" and member.name != "replica-0":
            return LOST
        return play_well(member, method, argument)

    fleet, _ = drive(play, num_units=40, max_attempts=1)
    assert sorted(fleet.published) == list(range(40))


def test_work_begins_when_enough_replicas_are_up() -> None:
    order: list[str] = []

    def play(member: Member, method: str, argument: Any) -> Any:
        order.append(method)
        return play_well(member, method, argument)

    drive(play, replicas=ReplicasConfig(min=3))
    assert order.index("run") > [n for n, method in enumerate(order) if method == "open"][2]


def test_a_replica_with_other_weights_ends_the_run() -> None:
    def play(member: Member, method: str, argument: Any) -> Any:
        if method == "start" and member.name != "replica-0":
            return {**FACTS, "weights_sha256": {"a": "9"}}
        return play_well(member, method, argument)

    with pytest.raises(ModelError, match="another weights_sha256"):
        drive(play, num_units=200)


def test_a_storage_error_ends_the_run_with_its_sentence() -> None:
    def play(member: Member, method: str, argument: Any) -> Any:
        return StorageError("the disk is full") if method == "run" else play_well(member, method, argument)

    with pytest.raises(StorageError, match="the disk is full"):
        drive(play)


def test_the_error_budget_counts_after_a_hundred() -> None:
    def play(member: Member, method: str, argument: Any) -> Any:
        if method == "run":
            return report(argument, num_failures=ROWS)
        return play_well(member, method, argument)

    fleet, _ = drive(play, num_units=24)
    assert len(fleet.published) == 24  # 96 failures
    with pytest.raises(StoppedError, match="100 of 100 requests failed"):
        drive(play, num_units=30)


def test_a_signal_stops_between_events() -> None:
    stop = StopSignal()

    def play(member: Member, method: str, argument: Any) -> Any:
        if method == "run":
            stop.stop("SIGTERM")
        return play_well(member, method, argument)

    with pytest.raises(StoppedError, match="SIGTERM"):
        drive(play, stop=stop)


def test_nothing_to_do_starts_nothing() -> None:
    fleet, _ = drive(num_units=0)
    assert fleet.created == 1
    assert fleet.calls == []
