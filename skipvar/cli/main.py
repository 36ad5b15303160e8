"""The console script: `skipvar generate …` is `python -m jobs.generate …`, and so on for the other commands."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from skipvar.cli.running import Parser

COMMANDS = {
    "generate": ("skipvar.cli.generate", "make a dataset of images from prompts"),
    "submit": ("skipvar.cli.submit", "submit a run to a cluster, once, and wait for it"),
    "verify": ("skipvar.cli.verify", "say whether a dataset is whole"),
    "report": ("skipvar.cli.report", "write the HTML report of a run"),
    "export": ("skipvar.cli.export", "write a dataset in another form"),
    "calibrate": ("skipvar.cli.calibrate", "fit policies for a model"),
    "evaluate": ("skipvar.cli.evaluate", "compare strategies and policies with base"),
    "certify_check": ("skipvar.cli.certify_check", "say whether certification keeps its promise"),
    "bench": ("skipvar.cli.bench", "time the engine, the planning of a run, or the driver"),
    "convert": ("skipvar.cli.convert", "convert Infinity's published weights"),
    "train_emoji": ("skipvar.cli.train_emoji", "train the embedded model"),
    "make_prompts": ("skipvar.cli.make_prompts", "compose prompts of graded detail"),
    "parity": ("skipvar.cli.parity", "compare with golden tensors of the reference"),
}
"""By command: its module (imported only when it is asked for) and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; returns its exit code."""
    lines = "\n".join(f"  {name:13} {what}" for name, (_, what) in COMMANDS.items())
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
    module = importlib.import_module(COMMANDS[chosen.command][0])
    code: int = module.main(given[1:], prog=f"skipvar {chosen.command}")
    return code
