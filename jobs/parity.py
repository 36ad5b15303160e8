"""Our tensors against golden ones: `python -m jobs.parity DIR [--json]`."""

import sys

from skipvar.cli.parity import main

if __name__ == "__main__":
    sys.exit(main())
