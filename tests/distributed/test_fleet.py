"""The driver's ears: nothing that a replica says is lost, however fast it talks."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

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


def test_every_word_is_heard_in_order() -> None:
    cluster: Any = SimpleNamespace(actor_options=lambda: {"num_cpus": 1})
    order: Any = None
    fleet = Fleet(cluster, lambda: None, order, Talkative())
    fleet.grow(1)
    heard = [message for _ in range(NUM_MESSAGES + 1) for _, message in fleet.events(0.0)]
    assert [message.num_steps for message in heard] == list(range(NUM_MESSAGES))


def test_one_that_never_pauses_leaves_the_driver_its_turn() -> None:
    cluster: Any = SimpleNamespace(actor_options=lambda: {"num_cpus": 1})
    order: Any = None
    fleet = Fleet(cluster, lambda: None, order, Talkative())
    fleet.grow(1)
    assert len(list(fleet.events(0.0))) < NUM_MESSAGES
