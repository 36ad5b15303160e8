"""Hands units to replicas until every one is published, or the run has to stop. It keeps no prompts."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from skipvar.config import RunConfig
from skipvar.distributed.dispatch import Assignment, Dispatcher
from skipvar.distributed.fleet import Event, Fleet, Member, ReplicaLost
from skipvar.distributed.metrics import Metrics
from skipvar.distributed.opening import OpenRun
from skipvar.distributed.stopping import StopSignal
from skipvar.errors import ModelError, SkipvarError, StoppedError
from skipvar.types import UnitReport

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.5
PROGRESS_SECONDS = 1.0
SURVEY_SECONDS = 10.0
"""How often the cluster is asked for room for more replicas."""
NUM_SEARCHES = 3
"""The run gives up when replicas die as often as this many searches for a request at fault, without one success."""
MIN_COUNTED_REQUESTS = 100
"""The error budget is not judged on fewer."""
MUST_AGREE = ("weights_sha256", "model_config_sha256", "policy_sha256", "dtype", "num_scales")
"""What every replica must describe as the first one did: else one run would hold two kinds of images."""


def start_first_replica(fleet: Fleet, config: RunConfig, stop: StopSignal) -> tuple[Member, dict[str, Any]]:
    """The first replica to come up, with its description; it resolves what depends on the device for the whole run."""
    num_deaths = 0
    while True:
        fleet.grow(max(1, len(fleet.members)))
        candidate = fleet.members[0]
        fleet.call(candidate, "start", config)
        warned = time.monotonic()
        event: Event | None = None
        while event is None:
            stop.check()
            event = next(iter(fleet.events(TICK_SECONDS)), None)
            if time.monotonic() - warned > 30:
                logger.info("Waiting for the first replica: the cluster is making room, or the model is loading")
                warned = time.monotonic()
        if isinstance(event.result, SkipvarError):
            raise event.result
        if not isinstance(event.result, ReplicaLost):
            return candidate, event.result
        fleet.drop(candidate)
        num_deaths += not event.result.is_preempted
        _give_up_if(num_deaths >= config.max_attempts, num_deaths, event.result)


class Driver:
    """The loop over what replicas ask for and report."""

    def __init__(
        self,
        config: RunConfig,
        fleet: Fleet,
        room: Callable[[], int],
        run: OpenRun,
        metrics: Metrics,
        stop: StopSignal,
    ) -> None:
        """`room` says how many replicas the cluster can hold."""
        self._config, self._fleet, self._room, self._run = config, fleet, room, run
        self._metrics, self._stop = metrics, stop
        self._order = run.order()
        self._num_units_left = run.num_units
        self._dispatcher = Dispatcher(
            run.units, max_attempts=config.max_attempts, images_per_prompt=config.sampling.images_per_prompt
        )
        self._surveyed = -math.inf
        self._has_begun = False
        self._num_expected = 1
        """Replicas that are up or have room to start."""
        self._num_deaths = 0
        """Replicas that died at work since a unit was published or a trial survived."""
        self._num_idle_deaths = 0
        """Replicas that died before they had anything to do, since then."""

    def run(self, first: Member) -> None:
        """Returns when every unit is published. `first` has described itself already.

        Raises `StoppedError`, or the `SkipvarError` of the replica that met it.
        """
        if not self._dispatcher.is_done:
            self._fleet.call(first, "open", self._order)
        while not self._dispatcher.is_done:
            self._keep_fleet()
            for event in self._fleet.events(TICK_SECONDS):
                self._handle(event)
            self._stop.check()
            self._check_limits()
            self._metrics.show()

    def _handle(self, event: Event) -> None:
        member, result = event.member, event.result
        if isinstance(result, SkipvarError):
            raise result
        if isinstance(result, ReplicaLost):
            self._lose(member, result)
        elif event.method == "start":
            self._check_description(member, result)
            self._fleet.call(member, "open", self._order)
        elif event.method == "open":
            logger.info("%s is up: %d of %d replicas", member.name, self._num_up() + 1, len(self._fleet.members))
            member.is_up = True
            self._fleet.call(member, "want_unit")
            self._fleet.call(member, "progress", PROGRESS_SECONDS)
            if not self._has_begun and self._num_up() >= self._num_needed():
                self._has_begun = True
                self._offer_again()
        elif event.method == "want_unit":
            member.is_asking = True
            self._offer(member)
        elif event.method == "run":
            self._finish(member, event.argument, result)
        elif event.method == "progress":
            self._metrics.in_hand(member.name, result)
            self._fleet.call(member, "progress", PROGRESS_SECONDS)

    def _offer(self, member: Member) -> None:
        """Give the replica that asks a unit, if there is one for it; else tell it not to wait for more.

        It never holds more than its share of the units that are left: the others' share is theirs to make, even where
        they are still starting.
        """
        if member.is_reserved or not self._has_begun:
            return
        has_share = len(member.in_flight) >= math.ceil(self._num_units_left / self._num_expected)
        assignment = None if has_share else self._dispatcher.next(is_idle=not member.in_flight)
        if assignment is not None:
            member.in_flight[assignment.unit.index] = assignment
            member.is_asking = False
            self._fleet.call(member, "run", assignment)
            if not assignment.is_alone:
                self._fleet.call(member, "want_unit")
        if assignment is None or assignment.is_alone or not self._dispatcher.has_work:
            self._fleet.call(member, "finish_up")

    def _finish(self, member: Member, assignment: Assignment, report: UnitReport | None) -> None:
        del member.in_flight[assignment.unit.index]
        self._dispatcher.finished(assignment)
        self._num_deaths = self._num_idle_deaths = 0
        if report is not None:
            self._num_units_left -= 1
            self._metrics.published(report)
            logger.debug("unit %d: %d images, %d failures", report.unit, report.num_images, report.num_failures)
            if not report.same_content:
                logger.warning("Unit %d was published before with other content; that stays", report.unit)
        if assignment.is_alone:
            self._fleet.call(member, "want_unit")
        self._offer_again()

    def _lose(self, member: Member, loss: ReplicaLost) -> None:
        """Requeue what the replica had; the next round replaces it."""
        why = "was preempted" if loss.is_preempted else f"is lost ({loss.reason})"
        units = ", ".join(str(index) for index in sorted(member.in_flight)) or "none"
        logger.warning("%s %s; units to be made again: %s", member.name, why, units)
        self._fleet.drop(member)
        self._metrics.in_hand(member.name, None)
        self._dispatcher.lost(list(member.in_flight.values()), is_preempted=loss.is_preempted)
        if member.is_up:
            self._surveyed = -math.inf  # replaced at once; one that dies at start waits for the next survey
        if not loss.is_preempted:
            self._count_death(member, loss)
        self._offer_again()

    def _count_death(self, member: Member, loss: ReplicaLost) -> None:
        """Give up where replicas die without anything getting done; one bad node beside good ones is no reason."""
        if member.in_flight:
            self._num_deaths += 1
            _give_up_if(self._num_deaths > self._max_deaths, self._num_deaths, loss)
        else:
            self._num_idle_deaths += 1
            is_hopeless = self._num_idle_deaths > self._config.max_attempts and self._num_up() == 0
            _give_up_if(is_hopeless, self._num_idle_deaths, loss)

    @property
    def _max_deaths(self) -> int:
        """More deaths in a row than this are no single request's fault: a search for one costs so many at the worst."""
        num_halvings = math.ceil(math.log2(max(2, self._run.unit_requests)))
        return NUM_SEARCHES * (self._config.max_attempts + 2 + num_halvings)

    def _offer_again(self) -> None:
        """What was just given back may be for a replica that asked in vain."""
        if self._dispatcher.has_work:
            for member in self._fleet.members:
                if member.is_asking:
                    self._offer(member)

    def _keep_fleet(self) -> None:
        """Have as many replicas as there is room and work for; start those that joined."""
        if time.monotonic() - self._surveyed >= SURVEY_SECONDS or len(self._fleet.members) < self._num_needed():
            self._surveyed = time.monotonic()
            most = self._config.cluster.replicas.max
            room = max(1, self._room()) if most == "auto" else int(most)
            known = set(self._fleet.members)
            size = min(room, max(1, self._num_units_left))
            self._num_expected = max(1, min(size, self._room()))
            self._fleet.grow(size)
            for member in self._fleet.members:
                if member not in known:
                    self._fleet.call(member, "start", self._config)

    def _num_up(self) -> int:
        return sum(member.is_up for member in self._fleet.members)

    def _num_needed(self) -> int:
        """Replicas that must be up before the first unit is handed out."""
        return min(self._config.cluster.replicas.min, max(1, self._num_units_left))

    def _check_description(self, member: Member, description: dict[str, Any]) -> None:
        for key in MUST_AGREE:
            if description.get(key) != self._run.description.get(key):
                raise ModelError(
                    f"{member.name} has another {key} than the first replica ({description.get(key)} against "
                    f"{self._run.description.get(key)}); give all nodes the same weights and policy."
                )

    def _check_limits(self) -> None:
        num_done, share = self._metrics.num_done, self._config.max_error_share
        if num_done >= MIN_COUNTED_REQUESTS and self._metrics.num_failures > share * num_done:
            raise StoppedError(
                f"{self._metrics.num_failures} of {num_done} requests failed, more than max_error_share ({share:g}); "
                "see the error table under errors/, then run again, with a higher max_error_share if that is right."
            )


def _give_up_if(is_hopeless: bool, num_deaths: int, loss: ReplicaLost) -> None:
    if is_hopeless:
        raise StoppedError(
            f"{num_deaths} replicas in a row died before they made anything; the last one: {loss.reason.rstrip('.')}."
        )
