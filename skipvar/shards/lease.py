"""One run at a time on an output: a lease with a heartbeat, judged by the watcher's own clock.

It saves work, no more: correctness rests on put-if-absent alone.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
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
        self._is_over = False
        self.interval_seconds = stale_seconds / BEATS_PER_STALE_PERIOD

    @property
    def is_over(self) -> bool:
        """Whether it was released, or another run was found to have taken it over."""
        return self._is_over

    def beat(self) -> bool:
        """Show that this run is alive. False once another run has taken the lease over: this one should end.

        Storage trouble is logged and passes: the units' own writes decide whether the run can go on.
        """
        with self._lock:
            if self._is_over:
                return False
            try:
                if _latest(self._storage) != self._generation:
                    self._is_over = True
                    return False
                self._beats += 1
                self._storage.replace(_name(self._generation), _content(self._owner, self._beats))
            except StorageError as error:
                logger.warning("the heartbeat could not be written: %s", error)
            return True

    def release(self) -> None:
        """Let the next run begin at once. Never raises: a lease that stays behind only makes it wait."""
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            try:
                if _latest(self._storage) == self._generation:
                    self._storage.delete(_name(self._generation))
            except StorageError as error:
                logger.warning("the lease could not be released: %s", error)


def acquire(storage: Storage, stale_seconds: float, sleep: Callable[[float], None] = time.sleep) -> Lease:
    """Take the lease of an output, waiting at most one stale period for another run that holds it.

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
    started = time.monotonic()
    seen: tuple[int, bytes] | None = None
    has_changed = False
    while True:
        latest = _latest(storage)
        content = _read(storage, latest)
        if content is None:  # nobody, or released just now
            lease = _claim(storage, latest + 1, owner, stale_seconds)
            if lease is not None:
                return lease
            continue
        has_changed |= seen is not None and seen != (latest, content)
        if seen is None:
            logger.info("another run (%s) holds this output; watching its heartbeat", _holder(content))
        seen = (latest, content)
        is_dead = _is_known_dead(content)
        if is_dead or time.monotonic() - started >= stale_seconds:
            if has_changed and not is_dead:
                raise LeaseHeldError(
                    f"Another run is at work on {storage.uri}: {_holder(content)}; wait for its end or stop it, "
                    "then run the same command again."
                )
            logger.warning("taking over from a run that shows no life (%s)", _holder(content))
            lease = _claim(storage, latest + 1, owner, stale_seconds)
            if lease is not None:
                _delete_older(storage, latest)
                return lease
            started, seen, has_changed = time.monotonic(), None, False  # another watcher was faster: watch it in turn
        sleep(min(_MAX_POLL_SECONDS, stale_seconds / BEATS_PER_STALE_PERIOD / 2))


def _claim(storage: Storage, generation: int, owner: dict[str, Any], stale_seconds: float) -> Lease | None:
    if storage.put_if_absent(_name(generation), _content(owner, 0)):
        return Lease(storage, generation, owner, stale_seconds)
    return None


def _latest(storage: Storage) -> int:
    """The highest generation there is; 0: none."""
    names = (entry.name.removeprefix(FOLDER).removesuffix(".json") for entry in storage.list(FOLDER))
    return max((int(name) for name in names if name.isdigit()), default=0)


def _read(storage: Storage, generation: int) -> bytes | None:
    if generation == 0:
        return None
    try:
        return storage.read(_name(generation))
    except NotFoundError:
        return None


def _delete_older(storage: Storage, generation: int) -> None:
    try:
        storage.delete(_name(generation))
    except StorageError as error:
        logger.warning("an old lease could not be deleted: %s", error)


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
