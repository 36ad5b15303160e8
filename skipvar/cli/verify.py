"""Say whether a dataset is whole (exit 0) or not (1)."""

import argparse
import logging
from collections.abc import Sequence

from skipvar.cli.running import Parser, add_dataset, open_dataset, run_job
from skipvar.shards.ledger import Ledger
from skipvar.shards.storage import Storage
from skipvar.shards.verify import Verdict, verify


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.verify") -> int:
    """Parse the arguments, look at the dataset and return the exit code."""
    parser = Parser(prog=prog, description=__doc__)
    add_dataset(parser)
    parser.add_argument("--full", action="store_true", help="decode every image, not only a sample")
    parser.add_argument("--repair", action="store_true", help="name the units to make again; deletes nothing")
    parser.add_argument("--yes", action="store_true", help="with --repair: unpublish them, so that the next run does")
    parser.add_argument("--retry-seconds", type=float, default=60.0, help="patience with an endpoint that is gone")
    options = parser.parse_args(argv)
    if options.yes and not options.repair:
        parser.error("--yes goes with --repair")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return run_job(lambda: _verify(options))


def _verify(options: argparse.Namespace) -> int:
    storage = open_dataset(options, retry_seconds=options.retry_seconds)
    verdict = verify(storage, full=options.full)
    _report(verdict, storage)
    if options.repair and verdict.units_to_make:
        _repair(verdict, storage, options.yes)
    return 0 if verdict.is_whole else 1


def _report(verdict: Verdict, storage: Storage) -> None:
    for note in verdict.notes:
        print(f"note: {note}")
    for problem in verdict.problems:
        print(f"problem: {problem}")
    verdict_text = "whole" if verdict.is_whole else "NOT whole"
    print(
        f"{storage.uri} is {verdict_text}: {verdict.num_images} images and {verdict.num_errors} errors "
        f"for {verdict.num_requests} requests."
    )


def _repair(verdict: Verdict, storage: Storage, is_confirmed: bool) -> None:
    print(f"to be made again: units {', '.join(map(str, verdict.units_to_make))}")
    if is_confirmed:
        removed = Ledger(storage).unpublish(verdict.units_to_make)
        print(f"unpublished {len(removed)} files; run the command that made the dataset again.")
    else:
        print("nothing was deleted; add --yes to unpublish what is there of them, then run the same command again.")
