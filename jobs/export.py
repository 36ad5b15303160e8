"""A finished dataset in another form: `python -m jobs.export OUTPUT --to geneval|webdataset DEST`."""

import sys

from skipvar.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
