"""The driver's ears: nothing that a replica says is lost, however fast it talks."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

import skipvar.distributed.fleet
from skipvar.distributed.fleet import Fleet
from skipvar.distributed.messages import Progress, Stop, Supply, ToReplica, pack, unpack

NUM_MESSAGES = 20


class Talkative:
    """A replica whose next word is there as soon as it is asked for."""

    def __init__(self, num_messages: int = NUM_MESSAGES) -> None:
        self._left = iter(range(num_messages))
        self.taken: list[tuple[ToReplica, ...]] = []
        self.sent: list[ToReplica] = []

    def options(self, **_: Any) -> "Talkative":
        return self

    def remote(self, *_: Any) -> Any:
        return SimpleNamespace(
            receive=SimpleNamespace(remote=self._receive),
            send=SimpleNamespace(remote=self.sent.append),
            taken=self.taken,
            sent=self.sent,
        )

    def _receive(self, messages: bytes) -> Any:
        self.taken.append(unpack(messages))
        return SimpleNamespace(future=self._answer)

    def _answer(self) -> "Future[bytes]":
        answer: Future[bytes] = Future()
        number = next(self._left, None)
        if number is not None:
            answer.set_result(pack([Progress(num_steps=number)]))
        return answer


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """Of one replica that has much to say."""
    monkeypatch.setattr(skipvar.distributed.fleet.ray, "remote", lambda replica: replica())
    cluster: Any = SimpleNamespace(actor_options=lambda: {"num_cpus": 1})
    order: Any = None
    made = Fleet(cluster, lambda: None, order, Talkative)
    made.grow(1)
    return made


def test_every_word_is_heard_in_order(fleet: Fleet) -> None:
    heard = [message for _ in range(NUM_MESSAGES + 1) for _, message in fleet.events(0.0)]
    assert [message.num_steps for message in heard] == list(range(NUM_MESSAGES))


def test_one_that_never_pauses_leaves_the_driver_its_turn(fleet: Fleet) -> None:
    assert len(list(fleet.events(0.0))) < NUM_MESSAGES


def test_what_is_sent_in_answer_goes_with_the_next_call_and_in_order(fleet: Fleet) -> None:
    [member] = fleet.members
    replies = [Supply(assignments=(), is_more_coming=is_more) for is_more in (True, False)]
    fleet.send(member, before := Stop())
    for message in fleet.events(0.0):
        for reply in replies:
            fleet.send(member, reply)
        assert message
        break  # as where the driver stops the run at a message
    events = fleet.events(0.0)
    next(events)
    assert member.actor.sent == [before]
    assert member.actor.taken[:2] == [(), tuple(replies)]


def test_a_dropped_replica_gets_no_answer(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skipvar.distributed.fleet.ray, "kill", lambda actor: None)
    for member, _ in fleet.events(0.0):
        fleet.send(member, Stop())
        fleet.drop(member)
    assert not list(fleet.events(0.0))
    assert member.actor.taken == [()] and member.actor.sent == []
