"""Prompts to a dataset of images: `python -m jobs.generate conf/emoji.yaml key=value ...`."""

import sys

from skipvar.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
