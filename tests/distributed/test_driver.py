"""The driver's loop against a fleet that is played, without Ray: who gets what, when it ends, when it gives up."""

import random
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from skipvar.config import BudgetConfig, ClusterConfig, ReplicasConfig, RunConfig
from skipvar.distributed.driver import Driver
from skipvar.distributed.fleet import Member
from skipvar.distributed.messages import (
    Assignment,
    Progress,
    ReplicaLost,
    RunFailed,
    Started,
    Supply,
    ToDriver,
    ToReplica,
    UnitDone,
)
from skipvar.distributed.metrics import Cost, Metrics
from skipvar.distributed.stopping import StopSignal
from skipvar.engine.resolved import DeviceReport
from skipvar.errors import ModelError, StoppedError, StorageError
from skipvar.types import Unit, UnitReport

ROWS = 4
REPORT = DeviceReport(processor="x", torch="x", batch_size={}, pool_images=4, self_check=None)
LOST = ReplicaLost(reason="the process died")


class PlayedFleet:
    """Replicas whose next word comes in random order; `play` says what comes of a start or of an assignment."""

    def __init__(self, play: "Play", seed: int = 0) -> None:
        self.play = play
        self.members: list[Member] = []
        self.pending: list[tuple[Member, Assignment | None]] = []
        """What will come: the start of a replica (None), or of an assignment."""
        self.created = 0
        self.published: list[int] = []
        self.most_in_flight: dict[str, int] = {}
        self.random = random.Random(seed)

    def grow(self, size: int) -> None:
        while len(self.members) < size:
            member = Member(f"replica-{self.created}", None)
            self.members.append(member)
            self.pending.append((member, None))
            self.created += 1

    def send(self, member: Member, message: ToReplica) -> None:
        assert isinstance(message, Supply)
        self.pending += [(member, assignment) for assignment in message.assignments]
        held = sum(other is member for other, _ in self.pending)
        self.most_in_flight[member.name] = max(self.most_in_flight.get(member.name, 0), held)

    def events(self, timeout_seconds: float) -> Iterator[tuple[Member, ToDriver]]:
        if not self.pending:
            time.sleep(min(timeout_seconds, 0.02))
            return
        member, assignment = self.pending.pop(self.random.randrange(len(self.pending)))
        message = self.play(member, assignment)
        if message is None:  # it hangs
            return
        if isinstance(message, UnitDone) and message.report is not None:
            self.published.append(message.unit)
        yield member, message
        if isinstance(message, UnitDone):
            left = sum(other is member for other, _ in self.pending)
            yield member, Progress(num_read=member.num_sent, num_unfinished=ROWS * left, num_steps=len(self.published))

    def drop(self, member: Member) -> None:
        self.members.remove(member)
        self.pending = [one for one in self.pending if one[0] is not member]


Play = Callable[[Member, Assignment | None], ToDriver | None]


def report(assignment: Assignment, num_failures: int = 0) -> UnitReport:
    return UnitReport(
        unit=assignment.unit.index,
        num_images=ROWS - num_failures,
        num_failures=num_failures,
        same_content=True,
        strategies={"base": ROWS - num_failures},
    )


def play_well(member: Member, assignment: Assignment | None, num_failures: int = 0) -> ToDriver:
    if assignment is None:
        return Started(report=REPORT, wanted_requests=2 * ROWS)
    made = None if assignment.is_isolation else report(assignment, num_failures)
    return UnitDone(unit=assignment.unit.index, report=made)


def make_driver(
    fleet: PlayedFleet, *, num_units: int = 12, room: int = 3, stop: StopSignal | None = None, **settings: Any
) -> Driver:
    units = (Unit(index=n, first_position=n * ROWS, num_rows=ROWS, slices=()) for n in range(num_units))
    run: Any = SimpleNamespace(units=units, num_units=num_units, unit_requests=ROWS)
    played: Any = fleet
    cluster: Any = SimpleNamespace(room=lambda: room, leaving_nodes=frozenset)
    return Driver(RunConfig(**settings), cluster, played, run, Metrics(num_units * ROWS, 0), stop or StopSignal())


def drive(play: Play = play_well, *, seed: int = 0, **settings: Any) -> tuple[PlayedFleet, Driver]:
    """Run to the end; the fleet with what it published, and the driver."""
    fleet = PlayedFleet(play, seed)
    driver = make_driver(fleet, **settings)
    driver.run()
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

    def play(member: Member, assignment: Assignment | None) -> ToDriver:
        if dice.random() < 0.1:
            return ReplicaLost(reason="gone", is_preempted=dice.random() < 0.5)
        return play_well(member, assignment)

    fleet, _ = drive(play, num_units=30, seed=seed, max_attempts=10)
    assert sorted(fleet.published) == list(range(30))


@pytest.mark.parametrize("seed", range(10))
def test_a_deadly_request_is_the_only_one_given_up(seed: int) -> None:
    deadly, given_up = (22, 0), []

    def play(member: Member, assignment: Assignment | None) -> ToDriver:
        if assignment is not None:
            unit = assignment.unit
            keys = unit.only or {(unit.first_position + row, 0) for row in range(ROWS)}
            if deadly in set(keys) - set(assignment.poisoned):
                return LOST
            given_up.extend(assignment.poisoned)
        return play_well(member, assignment)

    fleet, _ = drive(play, seed=seed)
    assert sorted(fleet.published) == list(range(12))
    assert given_up == [deadly]


def test_a_machine_that_kills_every_replica_at_work_ends_the_run() -> None:
    with pytest.raises(StoppedError, match="replicas in a row died"):
        drive(lambda member, assignment: play_well(member, None) if assignment is None else LOST)


def test_a_bad_node_beside_good_ones_does_not_end_the_run() -> None:
    def play(member: Member, assignment: Assignment | None) -> ToDriver:
        if assignment is None and member.name != "replica-0":
            return LOST
        return play_well(member, assignment)

    fleet, _ = drive(play, num_units=40, max_attempts=1)
    assert sorted(fleet.published) == list(range(40))


def test_work_begins_when_enough_replicas_are_up() -> None:
    order: list[bool] = []

    def play(member: Member, assignment: Assignment | None) -> ToDriver:
        order.append(assignment is None)
        return play_well(member, assignment)

    drive(play, cluster=ClusterConfig(replicas=ReplicasConfig(min=3)))
    assert order[:3] == [True] * 3


def test_a_replica_with_other_weights_ends_the_run() -> None:
    def play(member: Member, assignment: Assignment | None) -> ToDriver:
        if assignment is None and member.name != "replica-0":
            return RunFailed(error=ModelError("the vae weights here have SHA-256 1, the run was opened with 2"))
        return play_well(member, assignment)

    with pytest.raises(ModelError, match="the vae weights here"):
        drive(play, num_units=200)


def test_a_storage_error_ends_the_run_with_its_sentence() -> None:
    def play(member: Member, assignment: Assignment | None) -> ToDriver:
        if assignment is None:
            return play_well(member, None)
        return RunFailed(error=StorageError("the disk is full"))

    with pytest.raises(StorageError, match="the disk is full"):
        drive(play)


def test_the_error_budget_counts_after_a_hundred() -> None:
    def play(member: Member, assignment: Assignment | None) -> ToDriver:
        return play_well(member, assignment, num_failures=ROWS)

    fleet, _ = drive(play, num_units=24)
    assert len(fleet.published) == 24  # 96 failures
    with pytest.raises(StoppedError, match="100 of 100 requests failed"):
        drive(play, num_units=30)


def test_a_replica_that_hangs_is_as_good_as_dead() -> None:
    hung: list[str] = []

    def play(member: Member, assignment: Assignment | None) -> ToDriver | None:
        if assignment is not None and member.name == "replica-0":
            hung.append(member.name)
            return None
        return play_well(member, assignment)

    fleet, _ = drive(play, cluster=ClusterConfig(replica_timeout_seconds=0.3))
    assert hung and sorted(fleet.published) == list(range(12))
    assert "replica-0" not in [member.name for member in fleet.members]


def test_a_replica_that_only_answers_hangs_too() -> None:
    """Progress without a step is no progress."""
    fleet = PlayedFleet(play_well)
    member = Member("replica-0", None, moved_at=0.0)
    driver = make_driver(fleet)
    driver._handle(member, Progress(num_unfinished=3))
    assert member.moved_at == 0.0
    driver._handle(member, Progress(num_unfinished=3, num_steps=1))
    assert member.moved_at > 0.0


def test_a_signal_stops_between_events() -> None:
    stop = StopSignal()

    def play(member: Member, assignment: Assignment | None) -> ToDriver:
        if assignment is not None:
            stop.stop("SIGTERM")
        return play_well(member, assignment)

    with pytest.raises(StoppedError, match="SIGTERM"):
        drive(play, stop=stop)


def test_nothing_to_do_starts_nothing() -> None:
    fleet, _ = drive(num_units=0)
    assert fleet.created == 0 and not fleet.pending


def test_what_runs_after_the_last_look_costs_too() -> None:
    fleet = PlayedFleet(play_well)
    now = iter(range(1000))
    driver = make_driver(fleet)
    driver._metrics.cost = Cost(BudgetConfig(), clock=lambda: next(now))
    driver._tick = lambda: fleet.grow(1)  # type: ignore[method-assign]  # nothing is looked at after the start
    driver.run()
    assert driver._metrics.cost.replica_seconds == 1


@pytest.mark.parametrize(("num_up", "timeout", "seconds"), [(1, 600, 1), (1000, 600, 10), (1000, 8, 2), (1, 2, 0.5)])
def test_a_large_fleet_reports_less_often_but_before_it_is_taken_for_hanging(
    num_up: int, timeout: float, seconds: float
) -> None:
    driver = make_driver(PlayedFleet(play_well), cluster=ClusterConfig(replica_timeout_seconds=timeout))
    driver._num_up = num_up
    assert driver._report_seconds == seconds
