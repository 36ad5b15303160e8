"""What may end a run before all is done. No Ray in here."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator

from skipvar.errors import StoppedError


class StopSignal:
    """What may end a run in order before all is done: a signal, a limit of time, or a call of `stop`."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._reason = ""
        self._deadline = math.inf
        self._limit_seconds = math.inf

    def stop(self, reason: str) -> None:
        """The first reason counts."""
        self._reason = self._reason or reason
        self._event.set()

    def stop_after(self, seconds: float) -> None:
        """Stop when so many seconds have gone by from now."""
        self._deadline = time.monotonic() + seconds
        self._limit_seconds = seconds

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Meanwhile SIGINT and SIGTERM stop the run; a second one ends the process at once. For the main thread."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: object) -> None:
        self.stop(signal.Signals(number).name)
        for other in (signal.SIGINT, signal.SIGTERM):
            signal.signal(other, signal.SIG_DFL)

    def sleep(self, seconds: float) -> None:
        """Sleep, or raise `StoppedError` as soon as a signal comes."""
        self._event.wait(seconds)
        self.check()

    def check(self) -> None:
        """Raise `StoppedError` once stopped, or when the time is up."""
        if self._event.is_set():
            raise StoppedError(f"Stopped by {self._reason}; the same command resumes the run.")
        if time.monotonic() > self._deadline:
            raise StoppedError(f"max_seconds ({self._limit_seconds:g}) is over; the same command resumes the run.")
