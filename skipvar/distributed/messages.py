"""Everything that driver and replicas say to each other: small frozen values, whatever the size of a unit."""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from skipvar.engine.resolved import DeviceReport
from skipvar.engine.statistics import EngineStatistics
from skipvar.errors import SkipvarError
from skipvar.types import RequestKey, Unit, UnitReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One unit handed to one replica."""

    unit: Unit
    attempt: int
    """From 1: how often the unit was handed out, counting this time."""
    poisoned: Mapping[RequestKey, str] = field(default_factory=dict)
    """Requests that kill replicas, with what to say of each in the error table; they are not made."""
    is_isolation: bool = False
    """Make `unit.only` and throw the images away: only whether the replica survives matters."""
    is_alone: bool = False
    """The replica gets nothing else meanwhile, so that a death can be blamed on this unit."""
    must_be_base: bool = False
    """Every image under `base`, whatever the policy says: the audit's alarm stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Supply:
    """Driver to replica: make these units."""

    assignments: tuple[Assignment, ...]
    is_more_coming: bool
    """More units follow as soon as the replica runs low. Else its part-full batches need not wait for company."""
    report_seconds: float = 1.0
    """How often the replica tells how far it is, where it needs nothing."""
    number: int = 0
    """Rises with each that this replica is sent: of two that arrive the wrong way round the later one's word holds."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Driver to replica: take no more steps, publish what is complete, then say `Stopped`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Replica to driver: the model is loaded."""

    report: DeviceReport
    wanted_requests: int
    """It is well supplied with so many requests that have no result yet."""
    node: str = ""
    """Ray's id of the node where it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Replica to driver: how far it is. Comes every `Supply.report_seconds` at work, and when it runs low."""

    num_steps: int = 0
    """Batches run since it started."""
    num_published: int = 0
    """Units published since it started."""
    num_read: int = 0
    """Units whose rows have been read since it started."""
    num_unfinished: int = 0
    """Requests of those units that have no result yet."""
    num_failures: int = 0
    """Of the open units: failed requests,"""
    strategies: Mapping[str, int] = field(default_factory=dict)
    """and images under each strategy. They are not in any report yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitDone:
    """Replica to driver: a unit is published, or its isolation survived. Comes with the next `Progress`."""

    unit: int
    report: UnitReport | None
    """None: it was an isolation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """Replica to driver: the last word after `Stop`."""

    statistics: EngineStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFailed:
    """Replica to driver: it met what stops the whole run."""

    error: SkipvarError


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLost:
    """A replica is gone, or of no use any more. The replica itself says so where its engine broke."""

    reason: str
    is_preempted: bool = False


LastWord = Stopped | RunFailed | ReplicaLost
"""A replica says nothing more after it."""
ToReplica = Supply | Stop
ToDriver = Started | Progress | UnitDone | LastWord


def pack(messages: "Sequence[ToReplica | ToDriver]") -> bytes:
    """For Ray, whose own pickling of objects costs the driver a third of a call (`make bench-driver`)."""
    return pickle.dumps(tuple(messages))


def unpack(packed: bytes) -> tuple[Any, ...]:
    """What `pack` was given."""
    messages: tuple[Any, ...] = pickle.loads(packed)
    return messages
