"""Prompts to a dataset of images: `python -m jobs.generate conf/emoji.yaml key=value ...`.

Exit codes: 0 every prompt has its images; 2 usage, configuration or unreadable input, before any work; 3 finished, with
rows in the error table; 4 stopped, and the same command resumes.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from skipvar.config import load_config, to_yaml
from skipvar.distributed.environment import prepare_environment
from skipvar.distributed.stopping import StopSignal
from skipvar.errors import SkipvarError, StoppedError
from skipvar.shards.lease import LeaseHeldError

EXIT_USAGE, EXIT_STOPPED = 2, 4


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.generate", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a YAML file such as conf/emoji.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that win over the file's")
    parser.add_argument("--print-config", action="store_true", help="print every key with its value, and do nothing")
    parser.add_argument("--dry-run", action="store_true", help="print prompts, units, cost and time, and write nothing")
    arguments = parser.parse_intermixed_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("skipvar").setLevel(logging.INFO)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.print_config:
            print(to_yaml(config), end="")
            return 0
        prepare_environment(config)  # before anything imports Ray
        if arguments.dry_run:
            from skipvar.distributed.dry_run import estimate

            print(estimate(config))
            return 0
        from skipvar.distributed.generate import generate, summary

        stop = StopSignal()
        with stop.listening():
            outcome = generate(config, stop)
        print(summary(outcome))
        return outcome.exit_code
    except SkipvarError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_STOPPED if isinstance(error, StoppedError | LeaseHeldError) else EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
