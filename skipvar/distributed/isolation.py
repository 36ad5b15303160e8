"""The search for the request at fault in a unit that keeps killing replicas. No Ray in here."""

from collections import deque
from dataclasses import dataclass, field, replace

from skipvar.distributed.messages import Assignment
from skipvar.types import RequestKey, Unit

DEATHS_THAT_CONVICT = 3
"""A request is given up when replicas died so often with it alone, at least: a node may go down at any moment."""


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
