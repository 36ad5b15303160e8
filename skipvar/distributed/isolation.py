"""The search for the request at fault in a unit that keeps killing replicas. No Ray in here."""

from dataclasses import dataclass, field, replace

from skipvar.distributed.messages import Assignment
from skipvar.types import RequestKey, Unit

DEATHS_THAT_CONVICT = 2
"""A request is given up when replicas died so often with it alone: a node may go down at any moment."""


@dataclass
class Suspect:
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
        part = replace(unit, only=frozenset(self._tried()))
        return Assignment(unit=part, attempt=attempt, is_isolation=True, is_alone=True)

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
        """Those tried are innocent: the fault is among the others, or was none of the requests'."""
        assert self.candidates is not None
        others = self.candidates[len(self._tried()) :]
        self.candidates = others or None
        self.num_false_alarms += not others
        self.num_deaths_of_one = 0

    def _tried(self) -> list[RequestKey]:
        assert self.candidates is not None
        return self.candidates[: (len(self.candidates) + 1) // 2]


def request_keys(unit: Unit, images_per_prompt: int) -> list[RequestKey]:
    if unit.only is not None:
        return sorted(unit.only)
    positions = range(unit.first_position, unit.first_position + unit.num_rows)
    return [(position, image_index) for position in positions for image_index in range(images_per_prompt)]
