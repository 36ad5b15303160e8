"""Which unit goes out next, which again, and which request is at fault when replicas keep dying. No Ray in here."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from skipvar.errors import StoppedError
from skipvar.types import RequestKey, Unit

DEATHS_THAT_CONVICT = 2
"""A request is given up when replicas died so often with it alone: a node may go down at any moment."""


class UnitKeepsDyingError(StoppedError):
    """A unit kills replicas, but none of its requests does so alone. Stops the run (exit 4): the machine is suspect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One unit handed to one replica."""

    unit: Unit
    attempt: int
    """From 1: how often the unit was handed out, counting this time."""
    poisoned: Mapping[RequestKey, str] = field(default_factory=dict)
    """Requests that kill replicas, with what to say of each in the error table; they are not made."""
    is_trial: bool = False
    """Make `unit.only` and throw the images away: only whether the replica survives matters."""
    is_alone: bool = False
    """The replica gets nothing else meanwhile, so that a death can be blamed on this unit."""


class Dispatcher:
    """Hands out units; takes back those of dead replicas; isolates a unit that was lost `max_attempts` times.

    A suspected unit runs alone. If the replica dies again, halves of its requests are tried (and thrown away) until the
    one at fault stands alone; then the unit is made for real without it. So a unit is published once, come what may.
    """

    def __init__(self, units: Iterator[Unit], *, max_attempts: int, images_per_prompt: int) -> None:
        self._fresh = units
        self._again: deque[Assignment] = deque()
        self._suspects: deque[_Suspect] = deque()
        self._under_trial: dict[int, _Suspect] = {}
        self._max_attempts = max_attempts
        self._images_per_prompt = images_per_prompt
        self._ahead: Unit | None = next(units, None)
        self.num_in_flight = 0

    @property
    def has_work(self) -> bool:
        """Something could be handed out, to an idle replica at least."""
        return bool(self._ahead or self._again or self._suspects)

    @property
    def is_done(self) -> bool:
        return not self.has_work and self.num_in_flight == 0

    def next(self, *, is_idle: bool) -> Assignment | None:
        """The next assignment for a replica; `is_idle`: it has no other unit, so that a suspect may go to it."""
        assignment: Assignment | None = None
        if self._suspects and is_idle:
            suspect = self._suspects.popleft()
            self._under_trial[suspect.unit.index] = suspect
            assignment = suspect.assignment()
        elif self._again:
            assignment = self._again.popleft()
        elif self._ahead is not None:
            assignment = Assignment(unit=self._ahead, attempt=1)
            self._ahead = next(self._fresh, None)
        if assignment is not None:
            self.num_in_flight += 1
        return assignment

    def finished(self, assignment: Assignment) -> None:
        """The unit is published, or the trial survived."""
        self.num_in_flight -= 1
        suspect = self._under_trial.pop(assignment.unit.index, None)
        if suspect is not None and assignment.is_trial:
            suspect.survived()
            if suspect.num_false_alarms > self._max_attempts:
                raise UnitKeepsDyingError(
                    f"Unit {assignment.unit.index} killed {suspect.num_deaths} replicas, but none of its requests does "
                    "so alone; look at the replicas' memory and logs, then run the same command again."
                )
            self._suspects.append(suspect)

    def lost(self, assignments: Sequence[Assignment], *, is_preempted: bool) -> None:
        """A replica went with these in flight; a preempted one does not count against its units."""
        self.num_in_flight -= len(assignments)
        for assignment in assignments:
            suspect = self._under_trial.pop(assignment.unit.index, None)
            if suspect is not None:
                if not is_preempted:
                    suspect.died()
                self._suspects.append(suspect)
            elif is_preempted:
                self._again.append(assignment)
            elif assignment.attempt < self._max_attempts:
                self._again.append(replace(assignment, attempt=assignment.attempt + 1))
            else:
                keys = _request_keys(assignment.unit, self._images_per_prompt)
                self._suspects.append(_Suspect(assignment.unit, keys, num_deaths=assignment.attempt))


@dataclass
class _Suspect:
    """The search for the request at fault in one unit."""

    unit: Unit
    keys: list[RequestKey]
    """Requests of the unit that are not poisoned."""
    num_deaths: int
    candidates: list[RequestKey] | None = None
    """The fault is among these. None: not searching; the unit runs alone, for real."""
    poisoned: dict[RequestKey, str] = field(default_factory=dict)
    num_false_alarms: int = 0
    num_deaths_of_one: int = 0
    """Of the only candidate left: one death could be a coincidence."""

    def assignment(self) -> Assignment:
        unit, attempt = self.unit, self.num_deaths + 1
        if self.candidates is None:
            return Assignment(unit=unit, attempt=attempt, poisoned=dict(self.poisoned), is_alone=True)
        trial = replace(unit, only=frozenset(self._tried()))
        return Assignment(unit=trial, attempt=attempt, is_trial=True, is_alone=True)

    def died(self) -> None:
        self.num_deaths += 1
        self.candidates = self.keys if self.candidates is None else self._tried()
        if len(self.candidates) > 1:
            return
        self.num_deaths_of_one += 1
        if self.num_deaths_of_one == DEATHS_THAT_CONVICT:
            [key] = self.candidates
            self.num_deaths_of_one = 0
            self.poisoned[key] = f"The replica died making this request alone, as did {self.num_deaths - 1} before it."
            self.keys = [other for other in self.keys if other != key]
            self.candidates = None

    def survived(self) -> None:
        """The trial's requests are innocent: the fault is among the others, or was none of the requests'."""
        assert self.candidates is not None
        others = self.candidates[len(self._tried()) :]
        self.candidates = others or None
        self.num_false_alarms += not others
        self.num_deaths_of_one = 0

    def _tried(self) -> list[RequestKey]:
        assert self.candidates is not None
        return self.candidates[: (len(self.candidates) + 1) // 2]


def _request_keys(unit: Unit, images_per_prompt: int) -> list[RequestKey]:
    if unit.only is not None:
        return sorted(unit.only)
    positions = range(unit.first_position, unit.first_position + unit.num_rows)
    return [(position, image_index) for position in positions for image_index in range(images_per_prompt)]
