"""The driver's ears: nothing that a replica says is lost, however fast it talks, and no answer to it either."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError

import skipvar.distributed.fleet
from skipvar.distributed.fleet import Fleet
from skipvar.distributed.messages import (
    Progress,
    ReplicaLost,
    RunFailed,
    Started,
    Stop,
    Supply,
    ToDriver,
    ToReplica,
    pack,
    unpack,
)
from skipvar.engine.resolved import DeviceReport
from skipvar.errors import StorageError

REPORT = DeviceReport(processor="x", torch="x", batch_size={}, pool_images=4, self_check=None)
BROKEN = ActorUnavailableError("its connection broke", None)

Answer = tuple[ToDriver, ...] | Exception


class Played:
    """The remote class and its one actor: each answer is there as soon as `receive` is called; then it is silent."""

    def __init__(self, answers: Iterable[Answer]) -> None:
        self._answers: Iterator[Answer] = iter(answers)
        self.taken: list[tuple[ToReplica, ...]] = []
        """With each call of `receive`."""
        self.sent: list[ToReplica] = []
        self.receive, self.send = SimpleNamespace(remote=self._receive), SimpleNamespace(remote=self._send)

    def options(self, **_: Any) -> Any:
        return SimpleNamespace(remote=lambda *_: self)

    def _receive(self, messages: bytes) -> Any:
        self.taken.append(unpack(messages))
        answer: Future[bytes] = Future()
        match next(self._answers, None):
            case None:
                pass
            case Exception() as error:
                answer.set_exception(error)
            case said:
                answer.set_result(pack(said))
        return SimpleNamespace(future=lambda: answer)

    def _send(self, message: ToReplica) -> Any:
        self.sent.append(message)
        answer: Future[None] = Future()
        answer.set_result(None)
        return SimpleNamespace(future=lambda: answer)


def fleet_of(monkeypatch: pytest.MonkeyPatch, *answers: Answer) -> tuple[Fleet, Played]:
    """A fleet of one replica that gives these answers."""
    replica = Played(answers)
    monkeypatch.setattr(skipvar.distributed.fleet, "ASK_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(skipvar.distributed.fleet.ray, "remote", lambda _: replica)
    monkeypatch.setattr(skipvar.distributed.fleet.ray, "kill", lambda _: None)
    cluster: Any = SimpleNamespace(actor_options=lambda: {"num_cpus": 1})
    order: Any = None
    fleet = Fleet(cluster, lambda: None, order)
    fleet.grow(1)
    return fleet, replica


def steps(*numbers: int) -> tuple[ToDriver, ...]:
    return tuple(Progress(num_steps=number) for number in numbers)


def hear(fleet: Fleet, rounds: int = 20) -> list[ToDriver]:
    return [message for _ in range(rounds) for _, message in fleet.events(0.0)]


def test_every_word_is_heard_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, _ = fleet_of(monkeypatch, *(steps(2 * number, 2 * number + 1) for number in range(10)))
    assert hear(fleet) == list(steps(*range(20)))


def test_one_that_never_pauses_leaves_the_driver_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, _ = fleet_of(monkeypatch, *(steps(number) for number in range(20)))
    assert len(list(fleet.events(0.0))) < 20


def test_what_is_sent_in_answer_goes_with_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, replica = fleet_of(monkeypatch, steps(0))
    [member] = fleet.members
    fleet.send(member, Stop())
    replies = tuple(Supply(assignments=(), is_more_coming=is_more) for is_more in (True, False))
    for _ in fleet.events(0.0):
        for reply in replies:
            fleet.send(member, reply)
    assert replica.sent == [Stop()] and replica.taken == [(), replies]


def test_where_the_driver_leaves_its_loop_in_an_answer_its_rest_is_heard_later(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, replica = fleet_of(monkeypatch, (*steps(0, 1), ReplicaLost(reason="it broke")))
    [member] = fleet.members
    for _ in fleet.events(0.0):
        break
    fleet.send(member, Stop())
    assert hear(fleet) == [*steps(1), ReplicaLost(reason="it broke")]
    assert len(replica.taken) == 1, "a replica that is lost is not listened to"


def test_a_dropped_replica_is_neither_heard_nor_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, replica = fleet_of(monkeypatch, steps(0, 1))
    for member, _ in fleet.events(0.0):
        fleet.send(member, Stop())
        fleet.drop(member)
    assert not hear(fleet) and replica.taken == [()] and replica.sent == []


def test_one_whose_connection_broke_is_lost_though_it_lives_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it said meanwhile may have gone to the call that broke: it is not waited for."""
    fleet, _ = fleet_of(monkeypatch, steps(0), BROKEN)
    assert hear(fleet) == [*steps(0), ReplicaLost(reason="its connection broke")]


@pytest.mark.parametrize("last", [RunFailed(error=StorageError("the disk is full")), ReplicaLost(reason="it broke")])
def test_one_that_says_its_last_word_ends_the_wait(monkeypatch: pytest.MonkeyPatch, last: ToDriver) -> None:
    fleet, _ = fleet_of(monkeypatch, (Started(report=REPORT, wanted_requests=4),), (last,))
    for member, _ in fleet.events(0.0):
        member.wanted_requests = 4
        break
    heard = [message for _, message in fleet.stop(60.0)]
    assert len(heard) == 1 and type(heard[0]) is type(last) and not fleet.members
