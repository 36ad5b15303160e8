"""The console script: `skipvar generate …` is `python -m jobs.generate …`, and so on for the other commands."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from skipvar.cli.running import Parser

COMMANDS = {
    "generate": "make a dataset of images from prompts",
    "submit": "submit a run to a cluster, once, and wait for it",
    "verify": "say whether a dataset is whole",
    "report": "write the HTML report of a run",
    "export": "write a dataset in another form",
    "calibrate": "fit policies for a model",
    "evaluate": "compare strategies and policies with base",
    "certify_check": "say whether certification keeps its promise",
    "bench": "time the engine, the planning of a run, or the driver",
    "convert": "convert Infinity's published weights",
    "train_emoji": "train the embedded model",
    "make_prompts": "compose prompts of graded detail",
    "parity": "compare with golden tensors of the reference",
}
"""What each command does; its module has its name, and is imported only when it is asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; returns its exit code."""
    lines = "\n".join(f"  {name:13} {what}" for name, what in COMMANDS.items())
    parser = Parser(
        prog="skipvar",
        description="Datasets of images from prompts, with late scales skipped per image.",
        epilog=f"commands:\n{lines}\n\n`skipvar COMMAND --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the command's own")
    given = sys.argv[1:] if argv is None else list(argv)
    chosen = parser.parse_args(given[:1])
    module = importlib.import_module(f"skipvar.cli.{chosen.command}")
    code: int = module.main(given[1:], prog=f"skipvar {chosen.command}")
    return code
