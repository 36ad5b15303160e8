"""Compare this implementation with golden data of the reference.

Exit code 0: every case passed; 1: not; 2: the folder is not one of golden data.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from skipvar.cli.running import Parser, local_path, run_job


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.parity") -> int:
    """Parse the arguments, compare and return the exit code."""
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=local_path, help="laid out as tests/golden is")
    parser.add_argument("--json", action="store_true", help="print the last line only")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded
    return run_job(lambda: _compare(arguments.folder, is_quiet=arguments.json))


def _compare(folder: Path, *, is_quiet: bool) -> int:
    import torch

    from skipvar.model.allocator import keep_freed_memory
    from skipvar.parity.run import run_parity

    torch.set_num_threads(1)
    keep_freed_memory()
    report = run_parity(folder, None if is_quiet else lambda case: print(case.line, flush=True))
    print(json.dumps(report.summary()))
    return 0 if report.passed else 1
