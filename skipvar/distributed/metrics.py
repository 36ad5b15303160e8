"""How far a run is and what it costs: in a terminal's bar or a log's lines, and on Ray's Prometheus endpoint.

cluster/README.md documents the names there.
"""

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from ray.util import metrics as exported
from tqdm import tqdm

from skipvar.config import BudgetConfig
from skipvar.distributed.messages import Progress
from skipvar.engine.resolved import DeviceReport
from skipvar.engine.statistics import EngineStatistics
from skipvar.errors import StoppedError
from skipvar.types import UnitReport

logger = logging.getLogger(__name__)

LINE_SECONDS = 10.0
BAR_SECONDS = 0.5
SECONDS_PER_HOUR = 3600.0
MIN_COUNTED_REQUESTS = 100
"""The error budget is not judged on fewer."""


class Cost:
    """Adds up replica time. What a node costs while it boots and loads is not seen here: put it into the price."""

    def __init__(
        self, budget: BudgetConfig, usd_before: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`usd_before`: what earlier sessions of the run have cost."""
        self._budget = budget
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
        price = self._budget.usd_per_replica_hour
        return None if price is None else self.replica_seconds / SECONDS_PER_HOUR * price

    @property
    def usd(self) -> float | None:
        """Of the whole run so far; None where no price is known."""
        return None if self.session_usd is None else self._usd_before + self.session_usd

    def check(self) -> None:
        """Raise `StoppedError` once the run has cost `budget.max_usd`."""
        most = self._budget.max_usd
        if most is not None and self.usd is not None and self.usd >= most:
            raise StoppedError(
                f"The run has cost {self.usd:.2f} USD of budget.max_usd ({most:g}); "
                "the same command with a higher one resumes it."
            )

    def to_dict(self, num_images: int) -> dict[str, Any]:
        """For `_run.json`; `usd` is of all sessions, what stands beside it of this one, which made `num_images`."""
        usd, spent = self.usd, self.session_usd
        return {
            "usd": None if usd is None else round(usd, 6),
            "usd_per_image": None if spent is None or not num_images else round(spent / num_images, 9),
            "replica_seconds": round(self.replica_seconds, 1),
        }


def cost_text(told: Mapping[str, Any]) -> str:
    """What `Cost.to_dict` told, for a person: `1.23 USD, 0.0004 an image`, or nothing where no price is known."""
    usd, each = told["usd"], told["usd_per_image"]
    return "" if usd is None else f"{usd:.2f} USD" + (f", {each:.2g} an image" if each else "")


class Metrics:
    """Adds up what units report; what replicas have in hand is shown with it and not kept."""

    def __init__(self, num_requests: int, num_before: int, cost: Cost | None = None) -> None:
        """`num_requests` of the whole run, of which `num_before` were accounted for when it was resumed."""
        self.cost = cost or Cost(BudgetConfig())
        self.strategies: Counter[str] = Counter()
        """Published images under each strategy."""
        self.num_failures = 0
        self.num_units = 0
        self.num_differing_units = 0
        """Units that another worker had published with other content than was made here."""
        self.devices: list[DeviceReport] = []
        """The different ones that replicas reported, their self-check's verdict with them."""
        self.engines: list[EngineStatistics] = []
        """What the engines did that ended in order."""
        self._num_requests, self._num_before = num_requests, num_before
        self._started = time.monotonic()
        self._shown = self._started
        self._bar: tqdm[None] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=num_requests, initial=num_before, unit="image", mininterval=0, smoothing=0.1)
        self._export()

    def _export(self) -> None:
        """What Ray's Prometheus endpoint tells; without Ray these numbers go nowhere."""
        self._images = exported.Counter("skipvar_images", "Images published, by strategy", ("strategy",))
        self._failures = exported.Counter("skipvar_failures", "Requests that went to the error table")
        self._losses = exported.Counter(
            "skipvar_replica_losses", "Replicas lost, by cause: preempted or died", ("cause",)
        )
        self._retried = exported.Counter("skipvar_units_retried", "Units handed out again since their replica was lost")
        self._units_left = exported.Gauge("skipvar_units_left", "Units that are not published yet")
        self._units_in_flight = exported.Gauge("skipvar_units_in_flight", "Units that replicas hold")
        self._replicas = exported.Gauge("skipvar_replicas", "Replicas that are up")
        self._usd = exported.Gauge("skipvar_cost_usd", "What the run has cost so far, where a price is configured")
        self._usd_per_image = exported.Gauge("skipvar_cost_usd_per_image", "What an image of this session has cost")

    @property
    def num_images(self) -> int:
        return self.strategies.total()

    @property
    def num_done(self) -> int:
        """Requests accounted for in this session."""
        return self.num_images + self.num_failures

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def started(self, device: DeviceReport) -> None:
        """A replica is up; usually all have one kind of device."""
        if device not in self.devices:
            self.devices.append(device)

    def published(self, report: UnitReport) -> None:
        self.strategies.update(report.strategies)
        self.num_failures += report.num_failures
        self.num_units += 1
        self.num_differing_units += not report.same_content
        for strategy, count in report.strategies.items():
            if count:
                self._images.inc(count, {"strategy": strategy})
        if report.num_failures:
            self._failures.inc(report.num_failures)

    def check_failures(self, share: float) -> None:
        """Raise `StoppedError` where more than this share of the requests failed."""
        num_done = self.num_done
        if num_done >= MIN_COUNTED_REQUESTS and self.num_failures > share * num_done:
            raise StoppedError(
                f"{self.num_failures} of {num_done} requests failed, more than max_error_share ({share:g}); "
                "see the error table under errors/, then run again, with a higher max_error_share if that is right."
            )

    def lost(self, *, is_preempted: bool, num_units: int) -> None:
        """A replica is gone; `num_units` are to be made again."""
        self._losses.inc(1, {"cause": "preempted" if is_preempted else "died"})
        if num_units:
            self._retried.inc(num_units)

    def tick(self, *, num_replicas: int, num_units_left: int, num_in_flight: int) -> None:
        """Once a tick of the driver: what is up costs. Raises `StoppedError` at the end of the budget."""
        self.cost.tick(num_replicas)
        self._replicas.set(num_replicas)
        self._units_left.set(num_units_left)
        self._units_in_flight.set(num_in_flight)
        told = self.cost.to_dict(self.num_images)
        if told["usd"] is not None:
            self._usd.set(told["usd"])
        if told["usd_per_image"] is not None:
            self._usd_per_image.set(told["usd_per_image"])
        self.cost.check()

    def show(self, told: Iterable[Progress]) -> None:
        """Bring the bar up to date, or write a line if the last one is old enough. `told`: by each replica."""
        interval = LINE_SECONDS if self._bar is None else BAR_SECONDS
        if time.monotonic() - self._shown < interval:
            return
        self._shown = time.monotonic()
        reports = list(told)
        num_made = self.num_done + sum(each.num_failures + sum(each.strategies.values()) for each in reports)
        num_made = min(num_made, self._num_requests - self._num_before)  # what replicas told may be published by now
        if self._bar is not None:
            self._bar.n = self._num_before + num_made
            self._bar.set_postfix_str(self.mix(reports), refresh=False)
            self._bar.refresh()
            return
        rate = num_made / self.seconds
        left = self._num_requests - self._num_before - num_made
        eta = f"{timedelta(seconds=round(left / rate))} left" if num_made else "no image yet"
        logger.info(
            "%d of %d done, %.2f images/s, %s, %d failed, %s%s",
            self._num_before + num_made,
            self._num_requests,
            rate,
            eta,
            self.num_failures,
            self.mix(reports) or "no strategy yet",
            f", {cost}" if (cost := cost_text(self.cost.to_dict(self.num_images))) else "",
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.n = self._num_before + self.num_done
            self._bar.close()

    def mix(self, reports: Sequence[Progress]) -> str:
        """The share of each strategy, in words: `base 20%, skip_1 80%`."""
        made = self.strategies + sum((Counter(each.strategies) for each in reports), Counter())
        return ", ".join(f"{name} {count / made.total():.0%}" for name, count in sorted(made.items()) if count)
