"""Errors by what they stop: a row, a replica, or the run.

Every message is one sentence for the user: it names the file, the row or the key, what was wrong, and what is accepted.
"""

from typing import ClassVar

EXIT_ALL_ROWS, EXIT_USAGE, EXIT_ERROR_ROWS, EXIT_STOPPED = 0, 2, 3, 4
"""What commands return: all is made; a mistake found before any work; rows in the error table; stopped, resumable."""


def first_line(error: BaseException) -> str:
    """What an exception of a library says, cut to a short line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")


class SkipvarError(Exception):
    """Base of everything that is reported to the user without a traceback."""

    exit_code: ClassVar[int] = EXIT_STOPPED
    """What a command that ends with this error returns."""


class ConfigError(SkipvarError):
    """A key, a combination of keys or a policy file is unusable. Stops the run before any work (exit 2)."""

    exit_code = EXIT_USAGE


class InputError(SkipvarError):
    """An input file cannot be read or lacks a column. Stops the run before any work (exit 2)."""

    exit_code = EXIT_USAGE


class RowError(SkipvarError):
    """One row of the input has an unusable value. It goes to the error table; the run goes on (exit 3 in the end).

    Where it ends a command, the configuration gave a value that no row can use (exit 2).
    """

    exit_code = EXIT_USAGE


class ModelError(SkipvarError):
    """Weights are missing, left over, or do not fit the model's configuration. Stops the run at its start (exit 2)."""

    exit_code = EXIT_USAGE


class StorageError(SkipvarError):
    """A location cannot be used as it is now: full, denied, gone, wrong credentials. Stops the run (exit 4)."""

    exit_code = EXIT_STOPPED


class NotFoundError(StorageError):
    """The named object is not there."""


class StoppedError(SkipvarError):
    """The run ends in order before all is done, and the same command resumes it (exit 4)."""

    exit_code = EXIT_STOPPED
