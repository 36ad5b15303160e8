"""Write a finished dataset in another form: GenEval's folder tree or WebDataset's tars."""

import argparse
import logging
from collections.abc import Sequence

from skipvar.cli.running import Parser, local_path, run_job
from skipvar.config import StorageConfig
from skipvar.shards.export import FORMS, export
from skipvar.shards.storage import open_storage


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.export") -> int:
    """Parse the arguments, write the other form and return the exit code."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("output", metavar="OUTPUT", help="a finished dataset: a folder or s3://bucket/prefix")
    parser.add_argument("--to", required=True, choices=sorted(FORMS), help="GenEval's folder tree or WebDataset's tars")
    parser.add_argument("destination", metavar="DEST", type=local_path, help="a local folder that does not exist yet")
    parser.add_argument("--endpoint-url", help="the S3 endpoint, where the AWS environment does not name it")
    parser.add_argument("--region", help="the S3 region")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return run_job(lambda: _export(options))


def _export(options: argparse.Namespace) -> int:
    config = StorageConfig(endpoint_url=options.endpoint_url, region=options.region)
    num_images = export(open_storage(options.output, config), options.to, options.destination)
    print(f"{num_images} images in {options.destination}")
    return 0
