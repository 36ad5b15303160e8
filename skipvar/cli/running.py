"""What all commands share: errors become one sentence and an exit code."""

import argparse
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from skipvar.checks import check_one_of, message_of
from skipvar.config import RunConfig
from skipvar.config_file import load_config
from skipvar.errors import SkipvarError
from skipvar.model.presets import find_preset
from skipvar.skip.policy import check_spec


class Parser(argparse.ArgumentParser):
    """Arguments that are no command's are told as every other mistake is: one sentence, exit code 2."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"(--?[\w-]+)=\S*", r"\1=...", message)  # the value of an unknown option may be a secret
        print(f"error: {message_of(message).rstrip('.')}; {self.prog} --help tells what is accepted.", file=sys.stderr)
        raise SystemExit(2)


def read_config(path: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a command, its names looked up: nothing is started for what does not exist.

    Raises `ConfigError`.
    """
    config = load_config(path, overrides)
    preset = find_preset(config.model)
    if config.sampling.size is not None:
        check_one_of("sampling.size", config.sampling.size, preset.schedules.sizes)
    check_spec(config.policy)
    return config


def show_progress() -> None:
    """Let a long command say on standard error, with the time of day, how far it is."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("skipvar").setLevel(logging.INFO)


def run_job(job: Callable[[], int]) -> int:
    """Run a command and return its exit code; what stops it is told in one sentence on standard error."""
    try:
        return job()
    except SkipvarError as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        return error.exit_code
