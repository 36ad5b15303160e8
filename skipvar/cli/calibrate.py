"""Make trials with a run's model and prompts, and fit policies for it.

    python -m jobs.calibrate conf/calibrate.yaml [--out conf/policies] key=value ...

The trials are a run like any other, on the same Ray replicas and in the same storage: each prompt's image under every
strategy from one prefix. The same command again makes what is left of them, then fits. Exit codes as of jobs.generate.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from skipvar.cli.running import Parser, check_folder, local_path, read_config, run_job, show_progress


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.calibrate") -> int:
    """Parse the arguments, make the trials, fit the policies and return the exit code."""
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file such as conf/calibrate.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that win over the file's")
    parser.add_argument("--out", type=local_path, default=Path("conf/policies"), help="folder for the policy files")
    arguments = parser.parse_intermixed_args(argv)
    show_progress()
    return run_job(lambda: _calibrate(arguments))


def _calibrate(arguments: argparse.Namespace) -> int:
    from skipvar.distributed.environment import prepare_environment
    from skipvar.quality.calibrate import calibrate, check_input
    from skipvar.skip.policy import TRIALS

    config = replace(read_config(arguments.config, arguments.overrides), policy=TRIALS)
    check_folder("--out", arguments.out)
    prepare_environment(config)  # before anything imports Ray
    from skipvar.distributed.trials import make_trials_run

    made = make_trials_run(config, show=print, check=lambda plan: check_input(plan.identity, show=print))
    if made.trials is None:
        return made.exit_code
    found = calibrate(config, made.resolved, made.trials, arguments.out, show=print)
    print(json.dumps(found | {"trials_in": made.output}))
    return made.exit_code
