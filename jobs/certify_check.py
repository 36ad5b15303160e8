"""Does certification keep its word? `python -m jobs.certify_check conf/calibrate.yaml key=value ...`."""

import sys

from skipvar.cli.certify_check import main

if __name__ == "__main__":
    sys.exit(main())
