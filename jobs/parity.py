"""Compares this implementation with golden data of the reference: `python -m jobs.parity DIR [--json]`.

Exit code 0: every case passed; 1: not; 2: the folder is not one of golden data.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from skipvar.errors import SkipvarError
from skipvar.quality.golden_runner import keep_freed_memory
from skipvar.quality.parity import run_parity
from skipvar.quality.verdict import Case


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.parity", description=__doc__)
    parser.add_argument("folder", type=Path, help="laid out as tests/golden is")
    parser.add_argument("--json", action="store_true", help="print the last line only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()

    def show(case: Case) -> None:
        if not args.json:
            print(case.line, flush=True)

    try:
        report = run_parity(args.folder, show)
    except SkipvarError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(report.summary()))
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
