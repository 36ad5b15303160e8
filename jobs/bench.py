"""Measurements: `python -m jobs.bench`, `python -m jobs.bench plan`."""

import sys

from skipvar.cli.bench import main

if __name__ == "__main__":
    sys.exit(main())
