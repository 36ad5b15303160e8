"""Write the HTML report of a run, finished or not, beside its dataset."""

import argparse
from collections.abc import Sequence

from skipvar.cli.running import Parser, run_job
from skipvar.config import StorageConfig


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.report") -> int:
    """Parse the arguments, write the page, print where it is and return the exit code."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("output", metavar="OUTPUT", help="a folder or s3://bucket/prefix")
    parser.add_argument("--endpoint-url", help="the S3 endpoint, where the AWS environment does not name it")
    parser.add_argument("--region", help="the S3 region")
    options = parser.parse_args(argv)
    return run_job(lambda: _report(options))


def _report(options: argparse.Namespace) -> int:
    from skipvar.report.page import REPORT, write_report
    from skipvar.shards.storage import open_storage

    storage = open_storage(options.output, StorageConfig(endpoint_url=options.endpoint_url, region=options.region))
    write_report(storage)
    print(f"{storage.uri}/{REPORT}")
    return 0
