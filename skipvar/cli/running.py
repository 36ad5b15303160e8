"""What all commands share: errors become one sentence and an exit code."""

import argparse
import contextlib
import io
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from skipvar.checks import INT32_MAX, check_one_of, is_within, message_of, shown
from skipvar.config import RunConfig, StorageConfig
from skipvar.config_file import load_config
from skipvar.errors import ConfigError, SkipvarError, StorageError
from skipvar.model.presets import find_preset
from skipvar.shards.storage import Storage, open_storage
from skipvar.skip.policy_file import check_spec


class Parser(argparse.ArgumentParser):
    """Arguments that are no command's are told as every other mistake is: one sentence, exit code 2."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it, which would take `--option=--` for an empty list."""
        for argument in sys.argv[1:] if args is None else args:
            if argument.startswith("--") and argument.endswith("=--"):
                self.error(f"argument {argument.removesuffix('=--')}: expected a value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"(--?[\w-]+)=\S*", r"\1=...", message)  # the value of an unknown option may be a secret
        print(f"error: {message_of(message).rstrip('.')}; {self.prog} --help tells what is accepted.", file=sys.stderr)
        raise SystemExit(2)


def whole(low: int, high: int = INT32_MAX) -> Callable[[str], int]:
    """The type of an argument that takes a whole number from `low` to `high`."""

    def read(text: str) -> int:
        with contextlib.suppress(ValueError):
            if low <= int(text) <= high:
                return int(text)
        raise argparse.ArgumentTypeError(f"{shown(text)!r} is no whole number from {low} to {high}")

    return read


def number(low: float, high: float, *, is_between: bool = False) -> Callable[[str], float]:
    """The type of an argument that takes a number from `low` to `high`; `is_between`: neither of the two."""
    accepted = f"between {low:g} and {high:g}" if is_between else f"from {low:g} to {high:g}"

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = float(text)
            if is_within(value, low, high) and not (is_between and value in (low, high)):
                return value
        raise argparse.ArgumentTypeError(f"{shown(text)!r} is no number {accepted}")

    return read


def local_path(text: str) -> Path:
    """The type of an argument that names a file or a folder of this machine."""
    try:
        path = Path(text).expanduser()
        path.exists()
        if "\0" in text or not os.fsencode(text):  # raises for half of a surrogate pair
            raise ValueError("an empty name, or a NUL in it")
    except (OSError, RuntimeError, ValueError) as error:  # a name too long for any file, an unknown ~user
        reason = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(f"{shown(text)!r} cannot be used ({reason})") from error
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{shown(text)!r} is no path of a local file or folder")
    return path


def check_folder(option: str, folder: Path) -> None:
    """Refuse a folder that could not be written into, before any work. Leaves nothing behind."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{option} {folder}: no folder to write into ({error.strerror}); give another.") from error
    finally:
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()


def read_config(path: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a command, its names looked up: nothing is started for what does not exist.

    Raises `ConfigError`.
    """
    config = load_config(path, overrides)
    preset = find_preset(config.model)
    if preset is not None and config.sampling.size is not None:
        check_one_of("sampling.size", config.sampling.size, preset.schedules.sizes)
    check_spec(config.policy)
    return config


def add_dataset(parser: Parser, what: str = "a folder or s3://bucket/prefix") -> None:
    """The arguments that name a dataset; `open_dataset` opens it."""
    parser.add_argument("output", metavar="OUTPUT", help=what)
    parser.add_argument("--endpoint-url", help="the S3 endpoint, where the AWS environment does not name it")
    parser.add_argument("--region", help="the S3 region")


def open_dataset(options: argparse.Namespace, **settings: Any) -> Storage:
    """Where the dataset of a command's arguments lies. Raises `ConfigError`."""
    return open_storage(
        options.output, StorageConfig(endpoint_url=options.endpoint_url, region=options.region, **settings)
    )


def show_progress() -> None:
    """Let a long command say on standard error, with the time of day, how far it is."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("skipvar").setLevel(logging.INFO)


def run_job(job: Callable[[], int]) -> int:
    """Run a command and return its exit code; what stops it is told in one sentence on standard error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal lacks letters for is no error
    try:
        return job()
    except SkipvarError as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        print(f"error: {message_of(f'{error.filename}: {error.strerror}.')}", file=sys.stderr)
        return StorageError.exit_code
