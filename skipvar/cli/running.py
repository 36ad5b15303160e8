"""What all commands share: errors become one sentence and an exit code."""

import sys
from collections.abc import Callable, Sequence

from skipvar.checks import check_one_of
from skipvar.config import RunConfig
from skipvar.config_file import load_config
from skipvar.errors import SkipvarError
from skipvar.model.presets import find_preset
from skipvar.skip.policy import check_spec


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


def run_job(job: Callable[[], int]) -> int:
    """Run a command and return its exit code; what stops it is told in one sentence on standard error."""
    try:
        return job()
    except SkipvarError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
