"""Prompts to a dataset of images.

Exit codes: 0 every prompt has its images; 2 usage, configuration or unreadable input, before any work; 3 finished, with
rows in the error table; 4 stopped, and the same command resumes.
"""

import argparse
from collections.abc import Sequence

from skipvar.cli.running import Parser, read_config, run_job, show_progress
from skipvar.config_file import to_yaml


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.generate") -> int:
    """Parse the arguments, make the dataset and return the exit code."""
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file such as conf/emoji.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that win over the file's")
    parser.add_argument("--print-config", action="store_true", help="print every key with its value, and do nothing")
    parser.add_argument("--dry-run", action="store_true", help="print prompts, units, cost and time, and write nothing")
    arguments = parser.parse_intermixed_args(argv)
    show_progress()
    return run_job(lambda: _generate(arguments))


def _generate(arguments: argparse.Namespace) -> int:
    config = read_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(to_yaml(config), end="")
        return 0
    from skipvar.distributed.environment import prepare_environment

    prepare_environment(config)  # before anything imports Ray
    if arguments.dry_run:
        from skipvar.distributed.dry_run import estimate

        print(estimate(config))
        return 0
    from skipvar.distributed.generate import generate
    from skipvar.distributed.outcome import summary
    from skipvar.distributed.stopping import StopSignal

    stop = StopSignal()
    with stop.listening():
        outcome = generate(config, stop)
    print(summary(outcome))
    return outcome.exit_code
