"""Log files that live beside the dataset: those of a cluster die with it."""

import logging
import threading
import time

from skipvar.errors import StorageError
from skipvar.shards.ledger import LOG
from skipvar.shards.storage import Storage

SAVE_SECONDS = 10.0
LAST_SAVE_SECONDS = 5.0
"""At the end: whoever saves may be waiting for a store that is gone."""
MAX_LOG_BYTES = 4_000_000
"""A log that grows beyond this loses its older half: it is written whole each time."""

_LIBRARY = logging.getLogger("skipvar")
FORMAT = logging.Formatter("%(asctime)sZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
FORMAT.converter = time.gmtime


def log_name(session: str, who: str) -> str:
    """Where a log lies in the output: those of earlier sessions stay."""
    return f"{LOG}{session}-{who}.log"


class StoredLog(logging.Handler):
    """Keeps the library's records of INFO and above, and writes them to a storage every few seconds and when closed.

    Works before the storage is known: lines wait until `attach`.
    """

    def __init__(self, storage: Storage | None = None, name: str = "") -> None:
        super().__init__()
        self.setFormatter(FORMAT)
        self._storage, self._name = storage, name
        self._lines: list[str] = []
        self._num_bytes = 0
        self._is_saved = True
        self._end = threading.Event()
        self._saver = threading.Thread(target=self._save_often, name="log", daemon=True)
        self._saver.start()
        _LIBRARY.addHandler(self)
        _LIBRARY.setLevel(logging.INFO)

    def attach(self, storage: Storage, name: str) -> None:
        self._storage, self._name = storage, name

    def discard(self) -> None:
        """Save nothing from here on: the run is taken back."""
        self._end.set()
        self._saver.join(LAST_SAVE_SECONDS)
        self._storage = None

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record) + "\n"
        self._lines.append(line)
        self._num_bytes += len(line)
        if self._num_bytes > MAX_LOG_BYTES:
            self._lines = ["(older lines are gone)\n", *self._lines[len(self._lines) // 2 :]]
            self._num_bytes = sum(map(len, self._lines))
        self._is_saved = False

    def close(self) -> None:
        """Write what is left and end."""
        _LIBRARY.removeHandler(self)
        self._end.set()
        self._saver.join(LAST_SAVE_SECONDS)
        self._save()
        super().close()

    def _save_often(self) -> None:
        while not self._end.wait(SAVE_SECONDS):
            self._save()

    def _save(self) -> None:
        if self._is_saved or self._storage is None:
            return
        with self.lock or threading.Lock():
            text = "".join(self._lines)
            self._is_saved = True
        try:
            self._storage.replace(self._name, text.encode())
        except StorageError:  # the log must never end a run; the data's own writes will say what is wrong
            self._is_saved = False
