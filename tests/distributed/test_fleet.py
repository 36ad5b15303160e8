"""The driver's ears: nothing that a replica says is lost, however fast it talks."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

import skipvar.distributed.fleet
from skipvar.distributed.fleet import Fleet
from skipvar.distributed.messages import Progress, ToDriver

NUM_MESSAGES = 20


class Talkative:
    """A replica whose next word is there as soon as it is asked for."""

    def __init__(self, num_messages: int = NUM_MESSAGES) -> None:
        self._left = iter(range(num_messages))

    def options(self, **_: Any) -> "Talkative":
        return self

    def remote(self, *_: Any) -> Any:
        return SimpleNamespace(receive=SimpleNamespace(remote=lambda: SimpleNamespace(future=self._answer)))

    def _answer(self) -> "Future[tuple[ToDriver, ...]]":
        answer: Future[tuple[ToDriver, ...]] = Future()
        number = next(self._left, None)
        if number is not None:
            answer.set_result((Progress(num_steps=number),))
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
