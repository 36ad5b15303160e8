"""Write a finished dataset in another form: `python -m jobs.export OUTPUT --to geneval|webdataset DEST`."""

import argparse
import logging
import sys
from pathlib import Path

from skipvar.config import StorageConfig
from skipvar.errors import ConfigError, SkipvarError
from skipvar.shards.export import FORMS, export
from skipvar.shards.storage import open_storage


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.export", description="Write a dataset in another form.")
    parser.add_argument("output", metavar="OUTPUT", help="a finished dataset: a folder or s3://bucket/prefix")
    parser.add_argument("--to", required=True, choices=sorted(FORMS), help="GenEval's folder tree or WebDataset's tars")
    parser.add_argument("destination", metavar="DEST", type=Path, help="a local folder that does not exist yet")
    parser.add_argument("--endpoint-url", help="the S3 endpoint, where the AWS environment does not name it")
    parser.add_argument("--region", help="the S3 region")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        config = StorageConfig(endpoint_url=options.endpoint_url, region=options.region)
        num_images = export(open_storage(options.output, config), options.to, options.destination)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except SkipvarError as error:
        print(error, file=sys.stderr)
        return 4
    print(f"{num_images} images in {options.destination}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
