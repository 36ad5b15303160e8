"""Write the HTML report of a run: `python -m jobs.report OUTPUT`."""

import sys

from skipvar.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
