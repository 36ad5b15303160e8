"""What a run costs: the time that its replicas are up, at the price that the configuration names. No Ray in here."""

import time
from collections.abc import Callable
from typing import Any

from skipvar.config import BudgetConfig
from skipvar.errors import StoppedError

SECONDS_PER_HOUR = 3600.0


class Cost:
    """Adds up replica time. What a node costs while it boots and loads is not seen here: put it into the price."""

    def __init__(
        self, budget: BudgetConfig, usd_before: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`usd_before`: what earlier sessions of the run have cost."""
        self.budget = budget
        self.replica_seconds = 0.0
        self._usd_before, self._clock = usd_before, clock
        self._ticked = clock()

    def tick(self, num_replicas: int) -> None:
        """So many replicas were up since the last call."""
        now = self._clock()
        self.replica_seconds += num_replicas * (now - self._ticked)
        self._ticked = now

    @property
    def session_usd(self) -> float | None:
        price = self.budget.usd_per_replica_hour
        return None if price is None else self.replica_seconds / SECONDS_PER_HOUR * price

    @property
    def usd(self) -> float | None:
        """Of the whole run so far; None where no price is known."""
        return None if self.session_usd is None else self._usd_before + self.session_usd

    def usd_per_image(self, num_images: int) -> float | None:
        """Of the `num_images` that this session has made."""
        return self.session_usd / num_images if self.session_usd is not None and num_images else None

    def check(self) -> None:
        """Raise `StoppedError` once the run has cost `budget.max_usd`."""
        most = self.budget.max_usd
        if most is not None and self.usd is not None and self.usd >= most:
            raise StoppedError(
                f"The run has cost {self.usd:.2f} USD of budget.max_usd ({most:g}); "
                "the same command with a higher one resumes it."
            )

    def text(self, num_images: int) -> str:
        """`1.23 USD, 0.0004 an image`, or nothing where no price is known."""
        if self.usd is None:
            return ""
        each = self.usd_per_image(num_images)
        return f"{self.usd:.2f} USD" + ("" if each is None else f", {each:.2g} an image")

    def to_dict(self, num_images: int) -> dict[str, Any]:
        """For `_run.json`; `usd` is of all sessions, what stands beside it of this one."""
        each = self.usd_per_image(num_images)
        return {
            "usd": None if self.usd is None else round(self.usd, 6),
            "usd_per_image": None if each is None else round(each, 9),
            "replica_seconds": round(self.replica_seconds, 1),
        }
