"""Submit a run once and wait for it: `python -m jobs.submit --submission-id NAME -- COMMAND`."""

import sys

from skipvar.cli.submit import main

if __name__ == "__main__":
    sys.exit(main())
