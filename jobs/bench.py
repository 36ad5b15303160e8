"""Measurements: `python -m jobs.bench`, `... plan`, `... driver`."""

import sys

from skipvar.cli.bench import main

if __name__ == "__main__":
    sys.exit(main())
