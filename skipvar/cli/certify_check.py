"""Say by many random splits of kept trials whether certification keeps its promise; the last line is JSON.

    python -m jobs.certify_check conf/calibrate.yaml --trials-file outputs/trials.jsonl

"Within alpha" allows the untouched part one standard error. Exit 1 where fewer than 95% of the splits that certified
something are within it.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from skipvar.cli.running import read_config, run_job
from skipvar.errors import InputError


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.certify_check") -> int:
    """Parse the arguments, judge the splits and return the exit code."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="the YAML file that the trials were made with")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that win over the file's")
    parser.add_argument("--trials-file", type=Path, default=Path("outputs/trials.jsonl"))
    parser.add_argument("--floor", type=float, default=0.88, help="SSIM floor")
    parser.add_argument("--alpha", type=float, default=0.1, help="share that may fall below it")
    parser.add_argument("--delta", type=float, default=0.05, help="chance that a certificate may be wrong")
    parser.add_argument("--splits", type=int, default=200)
    arguments = parser.parse_intermixed_args(argv)
    return run_job(lambda: _check(arguments))


def _check(arguments: argparse.Namespace) -> int:
    from skipvar.engine.resolved import resolve, strategy_costs
    from skipvar.quality.calibrate import read_trials
    from skipvar.quality.certify_check import certify_check

    config = read_config(arguments.config, arguments.overrides)
    trials = read_trials(arguments.trials_file)
    if len({trial.prompt for trial in trials}) < 100:
        raise InputError(f"{arguments.trials_file}: fewer than 100 prompts are too few to split.")
    costs = strategy_costs(resolve(config), config.sampling.aspect_ratio)
    promise = (arguments.floor, arguments.alpha, arguments.delta)
    found = certify_check(trials, *promise, costs, splits=arguments.splits)
    print(json.dumps(found))
    shares = [found["share_within_alpha"], found["shuffled"]["share_within_alpha"]]
    return 0 if all(share is None or share >= 0.95 for share in shares) else 1
