"""The replicas as the driver sees them: who is up, what is under way, how each call ended. Ray's errors stop here."""

import contextlib
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from skipvar.distributed.cluster import Cluster
from skipvar.distributed.dispatch import Assignment
from skipvar.distributed.replica import EngineFactory, ReplicaActor
from skipvar.errors import SkipvarError

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Member:
    """One replica."""

    name: str
    actor: Any
    is_up: bool = False
    """It has units, or may get some."""
    is_asking: bool = False
    """It wants a unit, and there was none for it."""
    in_flight: dict[int, Assignment] = field(default_factory=dict)
    """By unit index."""

    @property
    def is_reserved(self) -> bool:
        """It holds a unit that must be alone."""
        return any(assignment.is_alone for assignment in self.in_flight.values())


@dataclass(frozen=True)
class ReplicaLost:
    """A call did not end because its replica is gone, or is of no use any more."""

    reason: str
    is_preempted: bool


@dataclass(frozen=True)
class Event:
    """A call that ended."""

    member: Member
    method: str
    argument: Any
    result: Any
    """What the call returned, or `ReplicaLost`, or the `SkipvarError` that stops the run."""


class Fleet:
    """Creates replicas, calls them and looks at how every call ended."""

    def __init__(self, cluster: Cluster, engine_factory: EngineFactory) -> None:
        self._cluster = cluster
        self._engine_factory = engine_factory
        self._numbers = itertools.count()
        self._calls: dict[Any, tuple[Member, str, Any]] = {}
        self.members: list[Member] = []

    def grow(self, size: int) -> None:
        """Create replicas until there are `size`; those that the cluster has no room for yet wait for it."""
        while len(self.members) < size:
            name = f"replica-{next(self._numbers)}"
            actor = ReplicaActor.options(**self._cluster.actor_options()).remote(name, self._engine_factory)
            self.members.append(Member(name, actor))

    def call(self, member: Member, method: str, argument: Any = None, *more: Any) -> None:
        """Call a method of the replica; `events` tells how it ended."""
        arguments = () if argument is None else (argument, *more)
        self._calls[getattr(member.actor, method).remote(*arguments)] = (member, method, argument)

    def events(self, timeout_seconds: float) -> Iterator[Event]:
        """The calls that have ended, after waiting for one at most so long. A dropped replica's are forgotten."""
        if not self._calls:
            return
        ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=timeout_seconds, fetch_local=False)
        if ready:
            ready, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0, fetch_local=False)
        for reference in ready:
            if reference in self._calls:  # else its replica was dropped while an earlier event was handled
                member, method, argument = self._calls.pop(reference)
                yield Event(member, method, argument, _outcome(reference))

    def drop(self, member: Member) -> None:
        """End a replica and forget its calls."""
        self.members.remove(member)
        self._calls = {reference: call for reference, call in self._calls.items() if call[0] is not member}
        with contextlib.suppress(RayError):
            ray.kill(member.actor)

    def stop(self, timeout_seconds: float) -> list[Event]:
        """Let all replicas publish what is complete, then end them.

        Returns the events of this time: the units that were published still, and the statistics (of `stop`) of the
        replicas that answered.
        """
        for member in list(self.members):
            if member.is_up:
                self.call(member, "stop")
            else:  # still starting, or waiting for room: nothing to wait for
                self.drop(member)
        stops = [reference for reference, (_, method, _) in self._calls.items() if method == "stop"]
        if stops:
            ray.wait(stops, num_returns=len(stops), timeout=timeout_seconds, fetch_local=False)
        events = list(self.events(0))
        for member in list(self.members):
            self.drop(member)
        return events


def _outcome(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, SkipvarError):
            return cause
        return ReplicaLost(f"{type(cause).__name__}: {cause}", is_preempted=False)
    except RayActorError as error:
        is_preempted = error.preempted or "node has died" in str(error)
        return ReplicaLost(_reason(error), is_preempted)
    except RayError as error:
        return ReplicaLost(_reason(error), is_preempted=False)


def _reason(error: Exception) -> str:
    """The telling line of one of Ray's long messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("The actor is dead", "ray.", "Worker exit detail"))]
    return (telling or lines or [type(error).__name__])[0].split(" Some common causes")[0][:300]
