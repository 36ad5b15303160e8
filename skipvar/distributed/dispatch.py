"""Which unit goes to which replica, and which again: the one place that knows what is in flight. No Ray in here.

A unit that keeps killing replicas is searched for the request at fault.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from skipvar.distributed.messages import Assignment
from skipvar.errors import StoppedError
from skipvar.types import RequestKey, Unit

NUM_RECENT = 256
"""Ends of assignments by which the machine is judged."""
COINCIDENCE = 1e-4
"""Deaths in a row are no unit's fault while the machine alone would bring them with more than this probability."""
DEATHS_THAT_CONVICT = 3
"""A request is given up when replicas died so often with it alone, at least: a node may go down at any moment."""
MAX_CONVINCING_DEATHS = 8
"""So many in a row are enough however unsound the machine is."""


@dataclass
class Suspect:
    """The search for the requests at fault in one unit, by group tests.

    The unit runs alone. If that keeps killing replicas, its halves do, one after the other: a group that survives is
    innocent, one that dies is halved in turn. So a death by chance costs time and leads nowhere, except for a request
    that is alone, which therefore takes several.
    """

    unit: Unit
    keys: list[RequestKey]
    """Requests of the unit that are not poisoned."""
    num_deaths: int
    groups: deque[list[RequestKey]] = field(default_factory=deque)
    """The fault is in these; the first is tried next. Empty: not searching; the unit runs alone, for real."""
    poisoned: dict[RequestKey, str] = field(default_factory=dict)
    num_false_alarms: int = 0
    """Searches that found nobody."""
    num_deaths_in_a_row: int = 0
    """Of the whole unit alone, or of one request alone, without a survival between."""

    def assignment(self) -> Assignment:
        unit, attempt = self.unit, self.num_deaths + 1
        if not self.groups:
            return Assignment(unit=unit, attempt=attempt, poisoned=dict(self.poisoned), is_alone=True)
        part = replace(unit, only=frozenset(self.groups[0]))
        return Assignment(unit=part, attempt=attempt, is_isolation=True, is_alone=True)

    def died(self, num_convincing: int) -> None:
        """The replica died with what was tried.

        Deaths of the whole unit start the search, and those of one request convict it, once there are `num_convincing`
        in a row.
        """
        self.num_deaths += 1
        tried = self.groups[0] if self.groups else self.keys
        if len(tried) == 1 or not self.groups:
            self.num_deaths_in_a_row += 1
            if self.num_deaths_in_a_row < max(num_convincing, DEATHS_THAT_CONVICT if len(tried) == 1 else 1):
                return
            self.num_deaths_in_a_row = 0
        if len(tried) > 1:
            if self.groups:
                self.groups.popleft()
            half = (len(tried) + 1) // 2
            self.groups.extendleft((tried[half:], tried[:half]))
        else:
            self._convict(tried)

    def _convict(self, one: list[RequestKey]) -> None:
        """Give it up; the unit runs for real without it, as most have only one."""
        why = f"The replica died making this request alone, as did {self.num_deaths - 1} before it."
        self.poisoned.update(dict.fromkeys(one, why))
        self.keys = [key for key in self.keys if key not in one]
        self.groups.clear()

    def survived(self) -> None:
        """Those tried are innocent: the fault is in another group, or was none of the requests'."""
        self.groups.popleft()
        self.num_false_alarms += not self.groups
        self.num_deaths_in_a_row = 0


class Dispatcher:
    """Hands out units; takes back those of dead replicas; isolates a unit that was lost `max_attempts` times.

    A suspected unit runs alone. If the replica dies again, parts of it are tried (and thrown away) until the request at
    fault stands alone; then the unit is made for real without it. So a unit is published once, come what may.
    Where replicas die with any unit (a node that fails, a killer outside), more deaths are needed to blame one.
    """

    def __init__(self, units: Iterator[Unit], *, max_attempts: int, images_per_prompt: int) -> None:
        self._fresh = units
        self._again: deque[Assignment] = deque()
        self._suspects: deque[Suspect] = deque()
        self._in_isolation: dict[int, Suspect] = {}
        self._max_attempts = max_attempts
        self._images_per_prompt = images_per_prompt
        self._ahead: Unit | None = next(units, None)
        self._in_flight: dict[str, dict[int, Assignment]] = {}
        """By replica, by unit."""
        self._recent: deque[frozenset[int]] = deque(maxlen=NUM_RECENT)
        """How the last assignments ended: the units that their replica died with; none where it survived."""
        self.must_be_base = False
        """What is handed out from now on is made under `base`."""

    @property
    def has_work(self) -> bool:
        """Something could be handed out, to an idle replica at least."""
        return bool(self._ahead or self._again or self._suspects)

    @property
    def is_done(self) -> bool:
        return not self.has_work and not self._in_flight

    @property
    def num_in_flight(self) -> int:
        return sum(map(len, self._in_flight.values()))

    def held_by(self, replica: str) -> Mapping[int, Assignment]:
        """What a replica has, by unit."""
        return self._in_flight.get(replica, {})

    def is_reserved(self, replica: str) -> bool:
        """Whether a replica holds a unit that must be alone."""
        return any(assignment.is_alone for assignment in self.held_by(replica).values())

    def next(self, replica: str) -> Assignment | None:
        """The next assignment for a replica; a suspect goes only to one that has nothing else."""
        assignment: Assignment | None = None
        if self._suspects and not self.held_by(replica):
            suspect = self._suspects.popleft()
            self._in_isolation[suspect.unit.index] = suspect
            assignment = suspect.assignment()
        elif self._again:
            assignment = self._again.popleft()
        elif self._ahead is not None:
            assignment = Assignment(unit=self._ahead, attempt=1)
            self._ahead = next(self._fresh, None)
        if assignment is not None:
            assignment = replace(assignment, must_be_base=self.must_be_base)
            self._in_flight.setdefault(replica, {})[assignment.unit.index] = assignment
        return assignment

    def finished(self, replica: str, unit: int) -> Assignment:
        """The unit is published, or its isolation survived; what it was."""
        assignment = self._in_flight[replica].pop(unit)
        if not self._in_flight[replica]:
            del self._in_flight[replica]
        self._recent.append(frozenset())
        suspect = self._in_isolation.pop(unit, None)
        if suspect is not None and assignment.is_isolation:
            suspect.survived()
            if suspect.num_false_alarms > self._max_attempts:
                raise StoppedError(  # the machine is suspect
                    f"Unit {unit} killed {suspect.num_deaths} replicas, but none of its requests does "
                    "so alone; look at the replicas' memory and logs, then run the same command again."
                )
            self._suspects.append(suspect)
        elif suspect is not None and suspect.poisoned:
            self._explain_deaths_of(unit)
        return assignment

    def lost(self, replica: str, *, is_preempted: bool) -> None:
        """A replica is gone, with all it had; a preempted one does not count against its units."""
        held = self._in_flight.pop(replica, {})
        if not is_preempted:
            self._recent.extend([frozenset(held)] * len(held))
        for assignment in held.values():
            suspect = self._in_isolation.pop(assignment.unit.index, None)
            if suspect is not None:
                self._suspects.append(suspect)
                if not is_preempted:
                    suspect.died(self._num_convincing_deaths())
            elif is_preempted:
                self._again.append(assignment)
            elif assignment.attempt < self._max_attempts:
                self._again.append(replace(assignment, attempt=assignment.attempt + 1))
            else:
                keys = assignment.unit.keys(self._images_per_prompt)
                self._suspects.append(Suspect(assignment.unit, keys, num_deaths=assignment.attempt))

    def _explain_deaths_of(self, unit: int) -> None:
        """They were a convicted request's, so they say nothing of the machine."""
        kept = [together for together in self._recent if unit not in together]
        self._recent = deque(kept, maxlen=NUM_RECENT)

    def _num_convincing_deaths(self) -> int:
        """Deaths in a row that are hardly chance, seen how often replicas die that no suspect explains; 1 if none do.

        A suspect explains the deaths it was part of until a search for its request at fault has found none.
        """
        suspects = [*self._suspects, *self._in_isolation.values()]
        explaining = {suspect.unit.index for suspect in suspects if suspect.num_false_alarms == 0}
        unexplained = [together for together in self._recent if not together & explaining]
        num_lost = sum(map(bool, unexplained))
        if num_lost == 0:
            return 1
        num_convincing = math.log(COINCIDENCE) / math.log(num_lost / (len(unexplained) + 1))
        return min(MAX_CONVINCING_DEATHS, math.ceil(num_convincing))
