"""Keeps replicas supplied with units until every one is published, or the run has to stop. It keeps no prompts."""

import logging
import math
import time
from collections.abc import Callable

from skipvar.config import RunConfig
from skipvar.distributed.cluster import Cluster
from skipvar.distributed.dispatch import DEATHS_THAT_CONVICT, Dispatcher
from skipvar.distributed.fleet import Fleet, Member
from skipvar.distributed.messages import (
    Assignment,
    Progress,
    ReplicaLost,
    RunFailed,
    Started,
    Stop,
    Stopped,
    Supply,
    ToDriver,
    UnitDone,
)
from skipvar.distributed.metrics import Metrics
from skipvar.distributed.opening import OpenRun
from skipvar.distributed.stopping import StopSignal
from skipvar.errors import StoppedError
from skipvar.quality.audit_book import AuditBook

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.5
"""How often all replicas are looked at; what a message costs does not depend on how many there are."""
SURVEY_SECONDS = 10.0
"""How often the cluster is asked for room for more replicas."""
OPEN_FACTOR = 4
"""Unpublished requests a replica may hold, in multiples of what it wants."""
NUM_SEARCHES = 3
"""The run gives up when replicas die as often as this many searches for a request at fault, without one success."""
MAX_REPORTS_PER_SECOND = 100.0
"""So many replicas tell every second how far they are; a larger fleet tells it less often."""
WAITING_SECONDS = 30.0
"""A line is logged so often while no replica is up."""


class Driver:
    """The loop over what replicas say."""

    def __init__(
        self,
        config: RunConfig,
        cluster: Cluster,
        fleet: Fleet,
        run: OpenRun,
        metrics: Metrics,
        stop: StopSignal,
        audits: AuditBook | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`audits` counts them, where something was promised."""
        self._audits, self._is_alarmed = audits, False
        self._config, self._cluster, self._fleet, self._run = config, cluster, fleet, run
        self._metrics, self._stop, self._clock = metrics, stop, clock
        self._dispatcher = Dispatcher(
            run.units, max_attempts=config.max_attempts, images_per_prompt=config.sampling.images_per_prompt
        )
        self._ticked = self._surveyed = -math.inf
        self._waited_since = clock()
        self._has_begun = False
        self._num_up = 0
        self._num_expected = 1
        """Replicas that are up or have room to start."""
        self._num_deaths = 0
        """Replicas that died at work since a unit was published or an isolation survived."""
        self._num_idle_deaths = 0
        """Replicas that died before they had anything to do, since then."""

    def run(self) -> None:
        """Returns when every unit is published.

        Raises `StoppedError`, or the `SkipvarError` of the replica that met it.
        """
        try:
            while not self._dispatcher.is_done:
                self._heed_audits()
                if self._clock() - self._ticked >= TICK_SECONDS:
                    self._tick()
                for member, message in self._fleet.events(TICK_SECONDS):
                    self._handle(member, message)
                self._stop.check()
        finally:
            self._metrics.cost.tick(self._num_up)  # what ran since the last look costs as well

    def end(self) -> None:
        """Let replicas publish what is complete, and count that; then end them."""
        for _, message in self._fleet.stop(self._config.cluster.grace_seconds):
            if isinstance(message, UnitDone) and message.report is not None:
                self._metrics.published(message.report)
            elif isinstance(message, Stopped):
                self._metrics.engines.append(message.statistics)
        self._metrics.close()

    def _tick(self) -> None:
        """What takes a look at every replica."""
        self._ticked = self._clock()
        self._end_hanging()
        self._leave_nodes()
        self._keep_fleet()
        self._metrics.tick(
            num_replicas=self._num_up,
            num_units_left=self._num_units_left,
            num_in_flight=self._dispatcher.num_in_flight,
        )
        self._metrics.show(member.progress for member in self._fleet.members)

    def _handle(self, member: Member, message: ToDriver) -> None:
        match message:
            case Started():
                self._start(member, message)
            case Progress():
                before = member.progress
                if (message.num_steps, message.num_published) != (before.num_steps, before.num_published):
                    member.moved_at = self._clock()
                member.progress = message
                self._supply(member)
            case UnitDone():
                self._finish(member, message)
            case ReplicaLost():
                self._lose(member, message)
            case Stopped():
                self._metrics.engines.append(message.statistics)
                self._lose(member, ReplicaLost(reason="its node is going", is_preempted=True))
            case RunFailed():
                self._fleet.drop(member)  # it says no more
                raise message.error

    @property
    def _num_units_left(self) -> int:
        return self._run.num_units - self._metrics.num_units

    def _start(self, member: Member, message: Started) -> None:
        member.wanted_requests, member.node = message.wanted_requests, message.node
        self._num_up += 1
        self._metrics.started(message.report)
        logger.info(
            "%s is up (%s): %d of %d replicas", member.name, message.report.processor, self._num_up,
            len(self._fleet.members),
        )  # fmt: skip
        if self._has_begun:
            self._supply(member)
        elif self._num_up >= self._num_needed():
            self._has_begun = True
            self._supply_all()

    def _supply(self, member: Member) -> None:
        """Give a replica what it wants, and never more than its share of the units that are left.

        The others' share is theirs to make, even where they are still starting. A replica that gets no more for now is
        told so: its part-full batches need not wait.
        """
        if not self._has_begun or member.wanted_requests is None:
            return
        given: list[Assignment] = []
        is_more_coming = False
        while self._may_have_another(member):
            if self._num_unfinished(member) >= member.wanted_requests:
                is_more_coming = self._dispatcher.has_work
                break
            assignment = self._dispatcher.next(member.name)
            if assignment is None:
                break
            given.append(assignment)
            member.num_sent += 1
        if given and len(given) == len(self._dispatcher.held_by(member.name)):
            member.moved_at = self._clock()  # it was idle until now
        if given or is_more_coming != member.expects_more:
            member.expects_more = is_more_coming
            member.num_supplies += 1
            supply = Supply(
                assignments=tuple(given),
                is_more_coming=is_more_coming,
                report_seconds=self._report_seconds,
                number=member.num_supplies,
            )
            self._fleet.send(member, supply)

    @property
    def _report_seconds(self) -> float:
        """How often a replica tells how far it is: several times before it would be taken for hanging."""
        timeout = self._config.cluster.replica_timeout_seconds
        return min(max(1.0, self._num_up / MAX_REPORTS_PER_SECOND), timeout / 4)

    def _may_have_another(self, member: Member) -> bool:
        num_held = len(self._dispatcher.held_by(member.name))
        assert member.wanted_requests is not None
        return (
            not member.is_leaving
            and not self._dispatcher.is_reserved(member.name)
            and num_held < math.ceil(self._num_units_left / self._num_expected)
            and num_held * self._run.unit_requests < OPEN_FACTOR * member.wanted_requests
        )

    def _num_unfinished(self, member: Member) -> int:
        """Requests without a result that a replica has, or that are on their way to it."""
        return member.progress.num_unfinished + (member.num_sent - member.progress.num_read) * self._run.unit_requests

    def _supply_all(self) -> None:
        """What was given back may be for a replica that was told to expect no more."""
        for member in self._fleet.members:
            if self._dispatcher.has_work and not member.expects_more:
                self._supply(member)

    def _finish(self, member: Member, message: UnitDone) -> None:
        assignment = self._dispatcher.finished(member.name, message.unit)
        member.moved_at = self._clock()
        self._num_deaths = self._num_idle_deaths = 0
        if (report := message.report) is not None:
            self._metrics.published(report)
            if self._audits is not None:
                self._audits.add((report.unit, assignment.unit.retry), report.audit_scores)
            logger.debug("unit %d: %d images, %d failures", report.unit, report.num_images, report.num_failures)
            if not report.same_content:
                logger.warning("Unit %d was published before with other content; that stays", report.unit)
            self._metrics.check_failures(self._config.max_error_share)
        if assignment.is_alone:
            self._supply_all()
        self._supply(member)

    def _heed_audits(self) -> None:
        """Count what audits found, and act on their alarm once. What was handed out before it stays as it is."""
        if self._audits is None or (alarm := self._audits.count()) is None or self._is_alarmed:
            return
        self._is_alarmed = True
        what = alarm.text(self._audits.promise)
        if self._config.audit.on_alarm == "stop":
            raise StoppedError(
                f"{what}; the same command with audit.on_alarm=base (or warn) resumes it, or another audit.state."
            )
        self._dispatcher.must_be_base = self._config.audit.on_alarm == "base"
        logger.warning("%s%s", what, "; from here on all is made under base" if self._dispatcher.must_be_base else "")

    def _lose(self, member: Member, loss: ReplicaLost) -> None:
        """Requeue what the replica had; the next round replaces it."""
        held = self._dispatcher.held_by(member.name)
        why = "was preempted" if loss.is_preempted else f"is lost ({loss.reason})"
        units = ", ".join(str(index) for index in sorted(held)) or "none"
        logger.warning("%s %s; units to be made again: %s", member.name, why, units)
        self._fleet.drop(member)
        self._num_up -= member.is_up
        self._ticked = -math.inf
        self._metrics.lost(is_preempted=loss.is_preempted, num_units=len(held))
        self._dispatcher.lost(member.name, is_preempted=loss.is_preempted)
        if member.is_up:
            self._surveyed = -math.inf  # replaced at once; one that dies at start waits for the next survey
        if not loss.is_preempted:
            self._count_death(loss, was_idle=not held)
        self._supply_all()

    def _end_hanging(self) -> None:
        """A replica with work that shows neither a step nor a publication for too long is as good as dead."""
        limit = self._config.cluster.replica_timeout_seconds
        for member in list(self._fleet.members):
            if self._dispatcher.held_by(member.name) and self._clock() - member.moved_at > limit:
                reason = f"no step and no publication for {limit:g} s (cluster.replica_timeout_seconds)"
                self._lose(member, ReplicaLost(reason=reason))

    def _leave_nodes(self) -> None:
        """A replica whose node is going publishes what is complete; others make the rest."""
        leaving = self._cluster.leaving_nodes()
        for member in self._fleet.members if leaving else ():
            if member.node in leaving and not member.is_leaving:
                logger.info("%s publishes what is complete: its node is going", member.name)
                member.is_leaving = True
                self._fleet.send(member, Stop())

    def _count_death(self, loss: ReplicaLost, *, was_idle: bool) -> None:
        """Give up where replicas die without anything getting done; one bad node beside good ones is no reason."""
        if was_idle:
            self._num_idle_deaths += 1
            num_deaths, most = self._num_idle_deaths, self._config.max_attempts * self._num_expected
        else:
            self._num_deaths += 1
            num_deaths, most = self._num_deaths, self._max_deaths
        if num_deaths > most and not (was_idle and self._num_up):
            raise StoppedError(
                f"{num_deaths} replicas in a row died before they made anything; the last one: "
                f"{loss.reason.rstrip('.')}."
            )

    @property
    def _max_deaths(self) -> int:
        """More deaths in a row than this are no single request's fault: a search for one costs so many at the worst."""
        num_halvings = math.ceil(math.log2(max(2, self._run.unit_requests)))
        return NUM_SEARCHES * (self._config.max_attempts + DEATHS_THAT_CONVICT + num_halvings)

    def _keep_fleet(self) -> None:
        """Have as many replicas as there is room and work for."""
        if self._clock() - self._surveyed >= SURVEY_SECONDS or len(self._fleet.members) < self._num_needed():
            self._surveyed = self._clock()
            most = self._config.cluster.replicas.max
            room = max(1, self._cluster.room())
            size = min(room if most == "auto" else int(most), max(1, self._num_units_left))
            self._num_expected = min(size, room)
            self._fleet.grow(size)
            if most == "auto":  # else those without room make the autoscaler add nodes
                self._retire(len(self._fleet.members) - room)
        if self._num_up:
            self._waited_since = self._clock()
        elif self._clock() - self._waited_since > WAITING_SECONDS:
            self._waited_since = self._clock()
            logger.info("Waiting for the first replica: the cluster is making room, or the model is loading")

    def _retire(self, num_too_many: int) -> None:
        """Room that vanished: take back replicas that wait for it."""
        waiting = [member for member in self._fleet.members if not member.is_up]
        for member in waiting[-num_too_many:] if num_too_many > 0 else ():
            self._fleet.drop(member)

    def _num_needed(self) -> int:
        """Replicas that must be up before the first unit is handed out."""
        return min(self._config.cluster.replicas.min, max(1, self._num_units_left))
