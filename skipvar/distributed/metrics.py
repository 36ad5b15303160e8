"""How far a run is: a bar in a terminal, a log line elsewhere, and numbers on Ray's Prometheus endpoint.

cluster/README.md documents the names.
"""

import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import timedelta

from ray.util import metrics as exported
from tqdm import tqdm

from skipvar.config import BudgetConfig
from skipvar.distributed.cost import Cost, cost_text
from skipvar.distributed.messages import Progress
from skipvar.engine.resolved import DeviceReport
from skipvar.engine.statistics import EngineStatistics
from skipvar.types import UnitReport

logger = logging.getLogger(__name__)

LINE_SECONDS = 10.0
BAR_SECONDS = 0.5


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
