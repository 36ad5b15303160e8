"""Make trials with a run's model and prompts, and fit policies for it, on this machine.

    python -m jobs.calibrate conf/calibrate.yaml --trials 600 --out conf/policies key=value ...

Trials go to `--trials-file` (JSON lines) as they are made; a second call makes only those that the file lacks
for the same model, prompts, seeds and sampling.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from skipvar.cli.running import read_config, run_job


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.calibrate") -> int:
    """Parse the arguments, fit the policies and return the exit code."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a YAML file such as conf/calibrate.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that win over the file's")
    parser.add_argument("--trials", type=int, default=600, help="how many images are made under every strategy")
    parser.add_argument("--trials-file", type=Path, default=Path("outputs/trials.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("conf/policies"), help="folder for the policy files")
    arguments = parser.parse_intermixed_args(argv)
    return run_job(lambda: _calibrate(arguments))


def _calibrate(arguments: argparse.Namespace) -> int:
    from skipvar.quality.calibrate import calibrate

    config = read_config(arguments.config, arguments.overrides)
    found = calibrate(config, arguments.trials, arguments.trials_file, arguments.out, show=print)
    print(json.dumps(found))
    return 0
