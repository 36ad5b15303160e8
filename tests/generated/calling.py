"""Commands called in this process, as from a shell: exit code and what was said. Ray and the model are left out."""

import contextlib
import io
import logging
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

from shards.making import draw

from skipvar.distributed import dry_run, generate, outcome
from skipvar.distributed.opening import OpenRun
from skipvar.shards.prompts import read_unit
from skipvar.shards.writer import UnitWriter
from skipvar.types import Request

HANG_SECONDS = 60


class Hung(BaseException):
    """No `Exception`: a command must not take it for one of its own troubles (`TimeoutError` is an `OSError`)."""


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str


def call(main: Callable[[list[str]], int], *arguments: str) -> Said:
    """Run a command's `main`; an exception that leaves it is a test's failure."""
    out, err = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, _hung)
    signal.alarm(HANG_SECONDS)
    library = logging.getLogger("skipvar")
    handler = logging.StreamHandler(err)  # pytest takes the root logger's handlers away
    library.addHandler(handler)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(arguments))
        except SystemExit as ended:  # argparse
            code = ended.code if isinstance(ended.code, int) else 1
        finally:
            signal.alarm(0)
            library.removeHandler(handler)
    return Said(code, out.getvalue(), err.getvalue())


def _hung(number: int, frame: Any) -> None:
    raise Hung(f"a command was still at work after {HANG_SECONDS} seconds")


class _Driver:
    """Makes the units one after the other, with an engine without a model."""

    def __init__(self, config: Any, cluster: Any, fleet: Any, run: OpenRun, metrics: Any, *others: Any) -> None:
        self._run, self._metrics = run, metrics

    def run(self) -> None:
        for unit in self._run.units:
            writer = UnitWriter(unit, self._run.order.dataset, "r0", 1, self._run.storage)
            for item in read_unit(unit, self._run.plan.spec):
                writer.add(draw(item) if isinstance(item, Request) else item)
            self._metrics.published(writer.publish())

    def end(self) -> None:
        pass


@contextlib.contextmanager
def without_ray() -> Iterator[None]:
    """`generate` makes its units in this process, `--dry-run` measures an engine without a model."""
    cluster = SimpleNamespace(device="cpu", start=lambda: None)
    engine = SimpleNamespace(submit=lambda requests: None, drain=lambda: [])
    fleet = SimpleNamespace(close=lambda: None)
    with (
        mock.patch.object(generate, "connect", lambda config: contextlib.nullcontext(cluster)),
        mock.patch.object(generate, "Fleet", lambda *arguments: fleet),
        mock.patch.object(generate, "Driver", _Driver),
        mock.patch.object(outcome, "write_sheet", lambda *arguments: None),
        mock.patch.object(outcome, "write_report", lambda *arguments: None),
        mock.patch.object(dry_run, "build_local_engine", lambda config, resolved: engine),
    ):
        yield
