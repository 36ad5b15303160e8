"""`generate` as it is, but for Ray: one replica that lives in the driver's process, with the fake engine, in miniature.

A session takes a fraction of a second, so a table of them can be played. `Blow` says what strikes it, and where.
"""

import contextlib
import errno
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from fakes import FakeEngine

from skipvar.config import RunConfig, StorageConfig
from skipvar.config_file import load_config
from skipvar.distributed import generate as generate_module
from skipvar.distributed.cluster import Cluster
from skipvar.distributed.fleet import Member
from skipvar.distributed.messages import Assignment, Progress, RunFailed, Started, Supply, ToDriver, UnitDone
from skipvar.distributed.stopping import StopSignal
from skipvar.errors import SkipvarError
from skipvar.shards import storage as storage_module
from skipvar.shards.prompts import read_unit
from skipvar.shards.storage import LocalStorage, open_storage
from skipvar.shards.writer import UnitWriter
from skipvar.types import Request, UnitReport

PROMPTS = ("a", "fail b", "c", "d", "e", "fail f", "g", "h")
UNIT_ROWS = 4


@dataclass(frozen=True)
class Blow:
    """What strikes the first write of an object: while its bytes are not visible yet, or once they are."""

    kind: Literal["kill", "full disk"]
    method: Literal["put_if_absent", "replace"]
    prefix: str
    when: Literal["before", "after"]


class OneReplica:
    """Stands where the driver expects its `Fleet`: makes what it is sent at once, one unit after the other."""

    def __init__(self, cluster: Any, build_engine: Any, order: Any) -> None:
        self.members: list[Member] = []
        self._order = order
        self._said: deque[ToDriver] = deque()
        self._storage = open_storage(order.dataset.output, order.dataset.storage)

    def grow(self, size: int) -> None:
        if not self.members:
            self.members.append(Member("replica-0", None))
            self._said.append(Started(report=FakeEngine().report, wanted_requests=1))

    def send(self, member: Member, message: Any) -> None:
        assert isinstance(message, Supply)
        for assignment in message.assignments:
            try:
                self._said.append(UnitDone(unit=assignment.unit.index, report=self._make(assignment)))
            except SkipvarError as error:
                self._said.append(RunFailed(error=error))

    def events(self, timeout_seconds: float) -> Iterator[tuple[Member, ToDriver]]:
        while self._said:
            member = self.members[0]
            yield member, self._said.popleft()
            yield member, Progress(num_read=member.num_sent)

    def drop(self, member: Member) -> None:
        self.members.remove(member)

    def stop(self, timeout_seconds: float) -> Iterator[tuple[Member, ToDriver]]:
        return iter(())

    def close(self) -> None:
        self.members.clear()

    def _make(self, assignment: Assignment) -> UnitReport:
        engine = FakeEngine()
        writer = UnitWriter(assignment.unit, self._order.dataset, "replica-0", assignment.attempt, self._storage)
        for item in read_unit(assignment.unit, self._order.input):
            if isinstance(item, Request):
                engine.submit([item])
            else:
                writer.add(item)
        while engine.can_step(flush=True):
            for made in engine.step(flush=True):
                writer.add(made)
        return writer.publish()


def make_config(folder: Path, output: str, storage: StorageConfig | None = None) -> RunConfig:
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    (folder / "run.yaml").write_text(
        f"input: {{path: {folder}/prompts.txt}}\n"
        f"output: {{path: '{output}', unit_rows: {UNIT_ROWS}}}\n"
        "model: {path: 'random:0', device: cpu}\n"
        "cluster: {address: local, replicas: {max: 1}}\n"
    )
    config = load_config(folder / "run.yaml", [])
    return config if storage is None else _with_storage(config, storage)


def session(config: RunConfig, blow: Blow | None = None) -> int:
    """The command's exit code; a `kill` ends the process."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(generate_module, "Fleet", OneReplica))
        stack.enter_context(mock.patch.object(Cluster, "start", lambda self: None))
        stack.enter_context(mock.patch.object(Cluster, "room", lambda self: 1))
        stack.enter_context(mock.patch.object(Cluster, "leaving_nodes", lambda self: frozenset()))
        stack.enter_context(mock.patch.object(storage_module, "YOUNG_SECONDS", 0.0))
        if blow is not None:
            stack.enter_context(struck(blow))
        try:
            return generate_module.generate(config, StopSignal()).exit_code
        except SkipvarError as error:
            return error.exit_code


def killed(folder: str, output: str, blow: Blow) -> None:
    """A session in a process of its own, which must not outlive the blow."""
    session(make_config(Path(folder), output), blow)


@contextlib.contextmanager
def struck(blow: Blow) -> Iterator[None]:
    """Local writes go through two `fsync`: of the bytes, while nobody sees them, and of the folder that shows them."""
    real_write: Callable[..., Any] = getattr(LocalStorage, blow.method)
    real_sync = os.fsync
    syncs_left: list[int] = []

    def write(self: LocalStorage, name: str, data: bytes) -> Any:
        if name.startswith(blow.prefix):
            syncs_left[:] = [1 if blow.when == "before" else 2]
        try:
            return real_write(self, name, data)
        finally:
            syncs_left.clear()

    def sync(descriptor: int) -> None:
        if syncs_left:
            syncs_left[0] -= 1
            if syncs_left[0] == 0:
                if blow.kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_sync(descriptor)

    with mock.patch.object(LocalStorage, blow.method, write), mock.patch.object(storage_module.os, "fsync", sync):
        yield


def _with_storage(config: RunConfig, storage: StorageConfig) -> RunConfig:
    from dataclasses import replace

    return replace(config, storage=storage)
