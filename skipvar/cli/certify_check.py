"""Say by many random splits of a run's trials whether certification keeps its promise; the last line is JSON.

    python -m jobs.certify_check conf/calibrate.yaml key=value ...

"Within alpha" allows the untouched part one standard error. Exit 1 where fewer than 95% of the splits that certified
something are within it.
"""

import argparse
import json
from collections.abc import Sequence

from skipvar.cli.running import Parser, number, read_config, run_job, show_progress, whole
from skipvar.errors import InputError


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.certify_check") -> int:
    """Parse the arguments, judge the splits and return the exit code."""
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="the YAML file that jobs.calibrate made the trials with")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that win over the file's")
    parser.add_argument("--floor", type=number(-1, 1), default=0.88, help="SSIM floor")
    parser.add_argument("--alpha", type=number(0, 1, is_between=True), default=0.1, help="share that may fall below it")
    parser.add_argument(
        "--delta", type=number(0, 1, is_between=True), default=0.05, help="chance that a certificate may be wrong"
    )
    parser.add_argument("--splits", type=whole(1), default=200, help="random splits")
    arguments = parser.parse_intermixed_args(argv)
    show_progress()
    return run_job(lambda: _check(arguments))


def _check(arguments: argparse.Namespace) -> int:
    from skipvar.distributed.environment import prepare_environment

    config = read_config(arguments.config, arguments.overrides)
    prepare_environment(config)  # before anything imports Ray
    from skipvar.distributed.trials import find_trials_run
    from skipvar.engine.resolved import strategy_costs
    from skipvar.quality.certify_check import certify_check
    from skipvar.skip.policy import Promise

    run = find_trials_run(config)
    assert run.trials is not None
    trials = run.trials
    if len({trial.prompt for trial in trials}) < 100:
        raise InputError(f"{run.output}: fewer than 100 prompts are too few to split.")
    costs = strategy_costs(run.resolved, config.sampling.aspect_ratio)
    promise = Promise(arguments.floor, arguments.alpha, arguments.delta)
    found = certify_check(trials, promise, costs, splits=arguments.splits, processes=-1)
    print(json.dumps(found))
    shares = [found["share_within_alpha"], found["shuffled"]["share_within_alpha"]]
    return 0 if all(share is None or share >= 0.95 for share in shares) else 1
