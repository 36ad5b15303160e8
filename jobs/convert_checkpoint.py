"""Infinity's published weights to one folder: `python -m jobs.convert_checkpoint --model ... --out DIR`."""

import sys

from skipvar.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
