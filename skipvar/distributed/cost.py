"""What a run costs: the time that its replicas are up, at the price that the configuration names. No Ray in here."""

import time
from collections.abc import Callable, Mapping
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

    def check(self) -> None:
        """Raise `StoppedError` once the run has cost `budget.max_usd`."""
        most = self.budget.max_usd
        if most is not None and self.usd is not None and self.usd >= most:
            raise StoppedError(
                f"The run has cost {self.usd:.2f} USD of budget.max_usd ({most:g}); "
                "the same command with a higher one resumes it."
            )

    def to_dict(self, num_images: int) -> dict[str, Any]:
        """For `_run.json`; `usd` is of all sessions, what stands beside it of this one, which made `num_images`."""
        price, usd = self.session_usd, self.usd
        return {
            "usd": None if usd is None else round(usd, 6),
            "usd_per_image": None if price is None or not num_images else round(price / num_images, 9),
            "replica_seconds": round(self.replica_seconds, 1),
        }


def cost_text(told: Mapping[str, Any]) -> str:
    """What `Cost.to_dict` told, for a person: `1.23 USD, 0.0004 an image`, or nothing where no price is known."""
    usd, each = told["usd"], told["usd_per_image"]
    return "" if usd is None else f"{usd:.2f} USD" + (f", {each:.2g} an image" if each else "")
