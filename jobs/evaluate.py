"""Every fixed strategy and every policy against `base`: `python -m jobs.evaluate CONFIG --policies FILE ...`."""

import sys

from skipvar.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
