"""The run's numbers on Ray's Prometheus endpoint, by `ray.util.metrics`; cluster/README.md documents the names."""

import time
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from skipvar.engine.statistics import EngineStatistics

UPDATE_SECONDS = 2.0


class RunMetrics:
    """What the driver knows."""

    def __init__(self) -> None:
        self._images = Counter("skipvar_images", "Images published, by strategy", ("strategy",))
        self._failures = Counter("skipvar_failures", "Requests that went to the error table")
        self._losses = Counter("skipvar_replica_losses", "Replicas lost, by cause: preempted or died", ("cause",))
        self._retried = Counter("skipvar_units_retried", "Units handed out again since their replica was lost")
        self._units_left = Gauge("skipvar_units_left", "Units that are not published yet")
        self._units_in_flight = Gauge("skipvar_units_in_flight", "Units that replicas hold")
        self._replicas = Gauge("skipvar_replicas", "Replicas that are up")
        self._usd = Gauge("skipvar_cost_usd", "What the run has cost so far, where a price is configured")
        self._usd_per_image = Gauge("skipvar_cost_usd_per_image", "What an image of this session has cost")

    def published(self, strategies: Mapping[str, int], num_failures: int) -> None:
        for strategy, count in strategies.items():
            if count:
                self._images.inc(count, {"strategy": strategy})
        if num_failures:
            self._failures.inc(num_failures)

    def lost(self, *, is_preempted: bool, num_units: int) -> None:
        self._losses.inc(1, {"cause": "preempted" if is_preempted else "died"})
        if num_units:
            self._retried.inc(num_units)

    def update(
        self,
        *,
        num_replicas: int,
        num_units_left: int,
        num_in_flight: int,
        usd: float | None,
        usd_per_image: float | None,
    ) -> None:
        self._replicas.set(num_replicas)
        self._units_left.set(num_units_left)
        self._units_in_flight.set(num_in_flight)
        if usd is not None:
            self._usd.set(usd)
        if usd_per_image is not None:
            self._usd_per_image.set(usd_per_image)


class EngineMetrics:
    """What one engine did, read by the thread that owns it."""

    def __init__(self, statistics: EngineStatistics, replica: str) -> None:
        self._statistics = statistics
        self._updated = 0.0
        self._pending = Gauge("skipvar_engine_pending", "Requests in the engine without a result", ("replica",))
        self._fill = Gauge("skipvar_batch_fill", "Mean fill of suffix batches since the start", ("replica",))
        self._seconds = Gauge("skipvar_phase_seconds", "Seconds in each phase since the start", ("replica", "phase"))
        self._tags = {"replica": replica}

    def update(self, num_pending: int) -> None:
        """Cheap to call after every step."""
        now = time.monotonic()
        if now - self._updated < UPDATE_SECONDS:
            return
        self._updated = now
        self._pending.set(num_pending, self._tags)
        self._fill.set(self._statistics.suffix_fill, self._tags)
        for phase, seconds in dict(self._statistics.seconds).items():
            self._seconds.set(seconds, {**self._tags, "phase": phase})
