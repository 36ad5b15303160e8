"""The embedded model: `python -m jobs.train_emoji all`."""

import sys

from skipvar.cli.train_emoji import main

if __name__ == "__main__":
    sys.exit(main())
