"""Policies for a model: `python -m jobs.calibrate conf/calibrate.yaml input.limit=640 key=value ...`."""

import sys

from skipvar.cli.calibrate import main

if __name__ == "__main__":
    sys.exit(main())
