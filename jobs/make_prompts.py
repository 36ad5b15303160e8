"""Prompts of graded detail: `python -m jobs.make_prompts mixed 96 --out prompts.txt`."""

import sys

from skipvar.cli.make_prompts import main

if __name__ == "__main__":
    sys.exit(main())
