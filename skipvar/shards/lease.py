"""One run at a time on an output: a lease with a heartbeat, judged by the watcher's own clock.

It saves work, no more: correctness rests on put-if-absent alone.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from skipvar.errors import NotFoundError, StorageError
from skipvar.shards.storage import Storage

logger = logging.getLogger(__name__)

FOLDER = "_lease/"
BEATS_PER_STALE_PERIOD = 6
_MAX_POLL_SECONDS = 2.0


class LeaseHeldError(StorageError):
    """Another run is at work on this output (exit 4)."""


class Lease:
    """The right to work on an output, as long as `beat` is called every `interval_seconds`. Thread-safe."""

    def __init__(self, storage: Storage, generation: int, owner: dict[str, Any], stale_seconds: float) -> None:
        """Use `acquire`."""
        self._storage = storage
        self._generation = generation
        self._owner = owner
        self._beats = 0
        self._lock = threading.Lock()
        self.is_over = False
        """Whether it was released, or another run was found to have taken it over."""
        self.interval_seconds = stale_seconds / BEATS_PER_STALE_PERIOD

    def beat(self) -> bool:
        """Show that this run is alive. False once another run has taken the lease over: this one should end.

        Storage trouble is logged and passes: the units' own writes decide whether the run can go on.
        """
        with self._lock, _logged("the heartbeat could not be written"):
            self.is_over = self.is_over or _latest(self._storage) != self._generation
            if not self.is_over:
                self._beats += 1
                self._storage.replace(_name(self._generation), _content(self._owner, self._beats))
        return not self.is_over

    def release(self) -> None:
        """Let the next run begin at once. Never raises: a lease that stays behind only makes it wait."""
        with self._lock, _logged("the lease could not be released"):
            was_over, self.is_over = self.is_over, True
            if not was_over and _latest(self._storage) == self._generation:
                self._storage.delete(_name(self._generation))


def acquire(storage: Storage, stale_seconds: float, sleep: Callable[[float], None] = time.sleep) -> Lease:
    """Take the lease of an output, watching another run that holds it for a stale period.

    Where the other's heartbeat does not change for a whole stale period, it is dead and its lease is taken over; where
    it changes, `LeaseHeldError` names host and age at the end of the period. A process of this very machine that has
    ended need not be waited for.
    """
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "kernel": _kernel(),
        "born": _birth(os.getpid()),
        "token": uuid.uuid4().hex,
        "since": time.time(),
    }
    while True:
        held = _latest(storage)
        if held and not _is_abandoned(storage, held, stale_seconds, sleep):
            continue  # it was let go: another may have come since
        if storage.put_if_absent(_name(held + 1), _content(owner, 0)):  # else another was faster: watch it in turn
            if held:
                with _logged("an old lease could not be deleted"):
                    storage.delete(_name(held))
            return Lease(storage, held + 1, owner, stale_seconds)


def _is_abandoned(storage: Storage, generation: int, stale_seconds: float, sleep: Callable[[float], None]) -> bool:
    """Watch a lease until it is let go (False), or its holder is known to be dead or shows no life for a stale period.

    `LeaseHeldError` where it lives.
    """
    deadline = time.monotonic() + stale_seconds
    first: bytes | None = None
    while True:
        try:
            content = storage.read(_name(generation))
        except NotFoundError:
            return False
        if first is None:
            first = content
            logger.info("another run (%s) holds this output; watching its heartbeat", _holder(content))
        is_late = time.monotonic() >= deadline
        if _is_known_dead(content) or (is_late and content == first):
            logger.warning("taking over from a run that shows no life (%s)", _holder(content))
            return True
        if is_late:
            raise LeaseHeldError(
                f"Another run is at work on {storage.uri}: {_holder(content)}; wait for its end or stop it, "
                "then run the same command again."
            )
        sleep(min(_MAX_POLL_SECONDS, stale_seconds / BEATS_PER_STALE_PERIOD / 2))


def _latest(storage: Storage) -> int:
    """The highest generation there is; 0: none."""
    names = (entry.name.removeprefix(FOLDER).removesuffix(".json") for entry in storage.list(FOLDER))
    return max((int(name) for name in names if name.isdigit()), default=0)


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    """Trouble with the storage is a warning here: no image depends on a lease."""
    try:
        yield
    except StorageError as error:
        logger.warning("%s: %s", what, error)


def _name(generation: int) -> str:
    return f"{FOLDER}{generation:09d}.json"


def _content(owner: dict[str, Any], beats: int) -> bytes:
    return json.dumps({**owner, "beats": beats}).encode()


def _kernel() -> str:
    """This boot of this machine and its space of process numbers, where Linux tells them; else nothing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _birth(pid: int) -> str:
    """When a process of this machine began, in ticks since boot; nothing once it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in ("Z", "X") else fields[18]


def _is_known_dead(content: bytes) -> bool:
    """Whether the lease's owner was a process that this machine would see if it were alive."""
    try:
        owner = json.loads(content)
        return bool(owner["kernel"]) and owner["kernel"] == _kernel() and _birth(int(owner["pid"])) != owner["born"]
    except (ValueError, KeyError, TypeError):
        return False


def _holder(content: bytes) -> str:
    """Host, process and age of a lease's owner. The age goes by the two machines' clocks: for messages only."""
    try:
        owner = json.loads(content)
        minutes = max(0.0, time.time() - float(owner["since"])) / 60
        return f"host {owner['host']}, process {owner['pid']}, started {minutes:.1f} minutes ago"
    except (ValueError, KeyError, TypeError):
        return "an unknown host"
