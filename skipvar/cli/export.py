"""Write a finished dataset in another form: GenEval's folder tree or WebDataset's tars."""

import argparse
import logging
from collections.abc import Sequence

from skipvar.cli.running import Parser, add_dataset, local_path, open_dataset, run_job
from skipvar.shards.export import FORMS, export


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.export") -> int:
    """Parse the arguments, write the other form and return the exit code."""
    parser = Parser(prog=prog, description=__doc__)
    add_dataset(parser, "a finished dataset: a folder or s3://bucket/prefix")
    parser.add_argument("--to", required=True, choices=sorted(FORMS), help="GenEval's folder tree or WebDataset's tars")
    parser.add_argument("destination", metavar="DEST", type=local_path, help="a local folder that does not exist yet")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return run_job(lambda: _export(options))


def _export(options: argparse.Namespace) -> int:
    num_images = export(open_dataset(options), options.to, options.destination)
    print(f"{num_images} images in {options.destination}")
    return 0
