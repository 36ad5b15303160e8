"""The replicas as the driver sees them: who there is, and what they say. Ray's errors stop here."""

import contextlib
import itertools
import queue
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from skipvar.distributed.cluster import Cluster
from skipvar.distributed.messages import LastWord, Progress, ReplicaLost, Stop, ToDriver, ToReplica, pack, unpack
from skipvar.distributed.opening import WorkOrder
from skipvar.distributed.replica import BuildEngine, Replica

ASK_AGAIN_SECONDS = 1.0
"""Ray takes some seconds to tell a dead node from a slow one."""


@dataclass(eq=False)
class Member:
    """One replica, and what the driver knows of it."""

    name: str
    actor: Any
    wanted_requests: int | None = None
    """As in `Started`; None: the model is being loaded."""
    node: str = ""
    """Where it is up."""
    is_leaving: bool = False
    """Its node is going: it was told to stop."""
    is_gone: bool = False
    """It was dropped."""
    is_cut_off: bool = False
    """Its connection broke, and what it said may be lost: it is lost, once Ray knows whether its node is."""
    reply: list[ToReplica] = field(default_factory=list)
    """What goes with the next call of its `receive`: one call of Ray's instead of two."""
    is_heard: bool = False
    """A call of its `receive` is out; else the driver acts on what the last one brought."""
    progress: Progress = field(default_factory=Progress)
    """The last that it told."""
    num_sent: int = 0
    """Units it was ever sent."""
    num_supplies: int = 0
    """And in how many messages."""
    expects_more: bool = False
    """What it was told last: `Supply.is_more_coming`."""
    moved_at: float = 0.0
    """When it was given something while it had nothing, or last showed that it gets on, by the driver's clock."""

    @property
    def is_up(self) -> bool:
        return self.wanted_requests is not None


class Fleet:
    """Creates replicas, tells them what to do, and hears what they say. A message costs the same for any number."""

    def __init__(self, cluster: Cluster, build_engine: BuildEngine, order: WorkOrder, replica: type = Replica) -> None:
        """`replica`: what runs in each actor; `Replica`, or what speaks as it does."""
        self._actor: Any = ray.remote(replica)
        self._cluster, self._build_engine, self._order = cluster, build_engine, order
        self._numbers = itertools.count()
        self._answers: queue.SimpleQueue[tuple[Member, Future[bytes]]] = queue.SimpleQueue()
        """Of the replicas' `receive`; Ray's thread puts them in."""
        self._cut_off: list[tuple[float, Member]] = []
        """When to ask which of them again."""
        self._unheard: deque[tuple[Member, ToDriver | None]] = deque()
        """The rest of an answer whose first message the driver acts on; None: then hear that replica again."""
        self.members: list[Member] = []

    def grow(self, size: int) -> None:
        """Create replicas until there are `size`; those that the cluster has no room for yet wait for it."""
        while len(self.members) < size:
            name = f"replica-{next(self._numbers)}"
            options = self._cluster.actor_options()
            actor = self._actor.options(**options).remote(name, self._build_engine, self._order, options["num_cpus"])
            member = Member(name, actor)
            self.members.append(member)
            self._listen(member)

    def send(self, member: Member, message: ToReplica) -> None:
        """Tell a replica something. That one is gone, `events` will say.

        Two messages may arrive the wrong way round where one goes with an answer.
        """
        if member.is_heard:
            member.actor.send.remote(message)
        else:
            member.reply.append(message)

    def events(self, timeout_seconds: float) -> Iterator[tuple[Member, ToDriver]]:
        """What replicas say, after waiting for something at most so long. A dropped replica is not heard any more."""
        yield from self._tell()
        self._ask_again()
        if self._cut_off:  # else a long wait, as at the end of a run, would put off asking again
            timeout_seconds = min(timeout_seconds, ASK_AGAIN_SECONDS)
        with contextlib.suppress(queue.Empty):
            for _ in range(len(self.members) + 1):  # then the caller has other things to look after
                member, answer = self._answers.get(timeout=timeout_seconds)
                timeout_seconds = 0.0
                if not member.is_gone:
                    self._unheard.extend((member, message) for message in self._heard(member, answer))
                    yield from self._tell()

    def _tell(self) -> Iterator[tuple[Member, ToDriver]]:
        """What one replica said, also where the driver left its loop after a part of it; then hear that one again."""
        while self._unheard:
            member, message = self._unheard.popleft()
            if message is None:
                self._listen(member)
            elif not member.is_gone:
                yield member, message

    def _heard(self, member: Member, answer: "Future[Any]") -> tuple[ToDriver | None, ...]:
        if isinstance(answer.exception(), ActorUnavailableError):
            member.is_cut_off = True
            self._cut_off.append((time.monotonic() + ASK_AGAIN_SECONDS, member))
            return ()
        if member.is_cut_off and answer.exception() is None:
            return (ReplicaLost(reason="its connection broke"),)
        said = _said(answer)
        if isinstance(said[-1], LastWord):
            return said
        member.is_heard = False
        return (*said, None)

    def _ask_again(self) -> None:
        """Replicas that were cut off answer that they are dead, and of what, once Ray has found out.

        Not by `receive`: one that lives may have a call of it left that nobody hears any more.
        """
        now = time.monotonic()
        for due, member in self._cut_off:
            if due <= now and not member.is_gone:
                self._hear(member, member.actor.send.remote(Stop()))
        self._cut_off = [(due, member) for due, member in self._cut_off if due > now]

    def _listen(self, member: Member) -> None:
        if not member.is_gone:
            self._hear(member, member.actor.receive.remote(pack(member.reply)))
            member.reply, member.is_heard = [], True

    def _hear(self, member: Member, call: Any) -> None:
        call.future().add_done_callback(lambda done: self._answers.put((member, done)))

    def drop(self, member: Member) -> None:
        """End a replica and hear it no more."""
        self.members.remove(member)
        member.is_gone = True
        with contextlib.suppress(RayError):
            ray.kill(member.actor)

    def stop(self, timeout_seconds: float) -> Iterator[tuple[Member, ToDriver]]:
        """Let all replicas publish what is complete, then end them. Yields what they still say."""
        for member in list(self.members):
            if member.is_up and timeout_seconds:
                self.send(member, Stop())
            else:  # still starting, or waiting for room: nothing to wait for
                self.drop(member)
        deadline = time.monotonic() + timeout_seconds
        while self.members and (left := deadline - time.monotonic()) > 0:
            for member, message in self.events(left):
                yield member, message
                if isinstance(message, LastWord):
                    self.drop(member)
        self.close()

    def close(self) -> None:
        """End all replicas, whatever they are at."""
        for member in list(self.members):
            self.drop(member)


def _said(answer: "Future[bytes]") -> tuple[ToDriver, ...]:
    """The messages that a call brought; at least one."""
    try:
        return unpack(answer.result())
    except RayTaskError as error:
        return (ReplicaLost(reason=f"{type(error.cause).__name__}: {error.cause}"),)
    except RayActorError as error:
        return (ReplicaLost(reason=_reason(error), is_preempted=error.preempted or "node has died" in str(error)),)
    except RayError as error:
        return (ReplicaLost(reason=_reason(error)),)


def _reason(error: Exception) -> str:
    """The telling line of one of Ray's long messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("The actor is dead", "ray.", "Worker exit detail"))]
    return (telling or lines or [type(error).__name__])[0].split(" Some common causes")[0][:300]
