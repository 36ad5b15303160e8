"""Write the HTML report of a run, finished or not, beside its dataset."""

import argparse
from collections.abc import Sequence

from skipvar.cli.running import Parser, add_dataset, open_dataset, run_job


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.report") -> int:
    """Parse the arguments, write the page, print where it is and return the exit code."""
    parser = Parser(prog=prog, description=__doc__)
    add_dataset(parser)
    options = parser.parse_args(argv)
    return run_job(lambda: _report(options))


def _report(options: argparse.Namespace) -> int:
    from skipvar.report.page import REPORT, write_report

    storage = open_dataset(options)
    write_report(storage)
    print(f"{storage.uri}/{REPORT}")
    return 0
