"""Submit a run to a Ray cluster under a name, once, and wait for it.

`{date}` in the name and in the command becomes the day (UTC, or --date). The exit code is the run's: 0, 2, 3; 4 where
it was stopped or the cluster is gone, and the same command resumes. SIGTERM stops the run in order.
"""

import argparse
import datetime
import os
import shlex
from collections.abc import Sequence

from skipvar.checks import check_http, is_text, require
from skipvar.cli.running import Parser, run_job
from skipvar.distributed.stopping import StopSignal


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.submit") -> int:
    """Parse the arguments, submit and wait; returns the run's exit code."""
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="http://127.0.0.1:8265", help="the cluster's job server")
    parser.add_argument("--submission-id", required=True, help="the run's name: a second submission joins the first")
    parser.add_argument("--date", default=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}", help="what {date} becomes")
    parser.add_argument("entrypoint", nargs="+", help="the command; one argument is a line for the shell")
    options = parser.parse_args(argv)
    return run_job(lambda: _submit(options))


def _submit(options: argparse.Namespace) -> int:
    check_http("--address", options.address)
    for name in ("submission_id", "date"):
        require(is_text(getattr(options, name)), f"--{name.replace('_', '-')}", getattr(options, name), "a text")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from skipvar.distributed.submission import connect, run_once

    line = options.entrypoint[0] if len(options.entrypoint) == 1 else shlex.join(options.entrypoint)
    stop = StopSignal()
    with stop.listening():
        return run_once(
            connect(options.address),
            options.submission_id.replace("{date}", options.date),
            line.replace("{date}", options.date),
            stop,
            lambda text: print(text, end="", flush=True),
        )
