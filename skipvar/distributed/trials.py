"""The run that makes trials: where it is, and what it has."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from skipvar.config import RunConfig
from skipvar.distributed.cluster import connect
from skipvar.distributed.generate import generate
from skipvar.distributed.opening import FINGERPRINT_FIELD, fingerprint_parts, prepare, settle
from skipvar.distributed.outcome import summary
from skipvar.distributed.stopping import StopSignal
from skipvar.engine.resolved import Resolved
from skipvar.errors import EXIT_ALL_ROWS, EXIT_STOPPED, InputError
from skipvar.quality.trials import read_trials
from skipvar.shards.ledger import Ledger
from skipvar.shards.prompts import Plan
from skipvar.shards.record import fingerprint
from skipvar.shards.storage import open_storage
from skipvar.skip.policy import TRIALS
from skipvar.types import Trial


@dataclass(frozen=True, kw_only=True)
class TrialsRun:
    """The trials of a configuration's prompts."""

    exit_code: int
    output: str
    resolved: Resolved
    trials: list[Trial] | None
    """None: the run was stopped, and the same command goes on."""


def make_trials_run(
    config: RunConfig, show: Callable[[str], None], check: Callable[[Plan], None] | None = None
) -> TrialsRun:
    """Make what is left of the trials, as a run like any other. Raises `SkipvarError` for what is found before work.

    `check` is shown the plan before anything is written, and may refuse it.
    """
    stop = StopSignal()
    with stop.listening():
        outcome = generate(replace(config, policy=TRIALS), stop, check=check)
    show(summary(outcome))
    trials = None
    if outcome.exit_code != EXIT_STOPPED:
        trials = read_trials(open_storage(outcome.output, config.storage))
    return TrialsRun(exit_code=outcome.exit_code, output=outcome.output, resolved=outcome.resolved, trials=trials)


def find_trials_run(config: RunConfig) -> TrialsRun:
    """The finished run of a configuration's trials; `InputError` where there is none. Starts nothing.

    Where `model.device` is `auto` it joins the cluster that `config` names, to ask what it has.
    """
    config = settle(replace(config, policy=TRIALS))
    device = config.model.device
    if device == "auto":  # what the cluster has, which may not be what this machine has
        with connect(config) as cluster:
            device = cluster.device
    resolved, plan = prepare(config, device)
    output = config.output.path.replace(FINGERPRINT_FIELD, fingerprint(fingerprint_parts(config, resolved, plan)))
    storage = open_storage(output, config.storage)
    ledger = Ledger(storage)
    if not ledger.is_finished() or len(ledger.done_units()) < plan.num_units:
        raise InputError(f"{output}: no finished trials of this configuration; jobs.calibrate makes them.")
    trials = read_trials(storage)
    return TrialsRun(exit_code=EXIT_ALL_ROWS, output=output, resolved=resolved, trials=trials)
