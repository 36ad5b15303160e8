"""The replicas as the driver sees them: who there is, and what they say. Ray's errors stop here."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from skipvar.distributed.cluster import Cluster
from skipvar.distributed.messages import Progress, ReplicaLost, Stop, Stopped, ToDriver, ToReplica
from skipvar.distributed.opening import WorkOrder
from skipvar.distributed.replica import ReplicaActor


@dataclass(eq=False)
class Member:
    """One replica, and what the driver knows of it."""

    name: str
    actor: Any
    wanted_requests: int | None = None
    """As in `Started`; None: the model is being loaded."""
    progress: Progress = field(default_factory=Progress)
    """The last that it told."""
    num_sent: int = 0
    """Units it was ever sent."""
    expects_more: bool = False
    """What it was told last: `Supply.is_more_coming`."""
    moved_at: float = field(default_factory=time.monotonic)
    """When it last showed that it gets on."""

    @property
    def is_up(self) -> bool:
        return self.wanted_requests is not None


class Fleet:
    """Creates replicas, tells them what to do, and hears what they say."""

    def __init__(self, cluster: Cluster, build_engine: Callable[[], Any], order: WorkOrder) -> None:
        self._cluster, self._build_engine, self._order = cluster, build_engine, order
        self._numbers = itertools.count()
        self._listening: dict[Any, Member] = {}
        self.members: list[Member] = []

    def grow(self, size: int) -> None:
        """Create replicas until there are `size`; those that the cluster has no room for yet wait for it."""
        while len(self.members) < size:
            name = f"replica-{next(self._numbers)}"
            options = self._cluster.actor_options()
            actor = ReplicaActor.options(**options).remote(name, self._build_engine, self._order, options["num_cpus"])
            member = Member(name, actor)
            self.members.append(member)
            self._listening[actor.receive.remote()] = member

    def send(self, member: Member, message: ToReplica) -> None:
        """Tell a replica something; messages arrive in their order. That one is gone, `events` will say."""
        member.actor.send.remote(message)

    def events(self, timeout_seconds: float) -> Iterator[tuple[Member, ToDriver]]:
        """What replicas say, after waiting for something at most so long. A dropped replica is not heard any more."""
        if not self._listening:
            time.sleep(timeout_seconds)
            return
        ready, _ = ray.wait(list(self._listening), num_returns=1, timeout=timeout_seconds, fetch_local=False)
        if ready:
            ready, _ = ray.wait(list(self._listening), num_returns=len(self._listening), timeout=0, fetch_local=False)
        for reference in ready:
            member = self._listening.pop(reference, None)  # None: dropped while an earlier message was handled
            if member is None:
                continue
            said = _said(reference)
            if not isinstance(said[-1], ReplicaLost | Stopped):
                self._listening[member.actor.receive.remote()] = member
            for message in said:
                if member in self.members:
                    yield member, message

    def drop(self, member: Member) -> None:
        """End a replica and hear it no more."""
        self.members.remove(member)
        self._listening = {reference: other for reference, other in self._listening.items() if other is not member}
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
                if isinstance(message, Stopped | ReplicaLost):
                    self.drop(member)
        for member in list(self.members):
            self.drop(member)


def _said(reference: Any) -> tuple[ToDriver, ...]:
    """The messages that a call brought; at least one."""
    try:
        said: tuple[ToDriver, ...] = ray.get(reference)
        return said
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
