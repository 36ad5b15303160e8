"""Is a dataset whole? `python -m jobs.verify OUTPUT [--full] [--repair [--yes]]`."""

import sys

from skipvar.cli.verify import main

if __name__ == "__main__":
    sys.exit(main())
