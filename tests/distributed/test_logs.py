"""Logs beside the dataset: a store that is gone must not keep a run from ending."""

import logging
import threading
import time
from pathlib import Path

import pytest

from skipvar.distributed import logs
from skipvar.distributed.logs import StoredLog
from skipvar.shards.storage import LocalStorage


class Gone(LocalStorage):
    """Keeps whoever writes waiting."""

    asked = threading.Event()

    def replace(self, name: str, data: bytes) -> None:
        self.asked.set()
        time.sleep(60)


def test_a_log_ends_in_seconds_though_a_save_still_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "SAVE_SECONDS", 0.05)
    monkeypatch.setattr(logs, "LAST_SAVE_SECONDS", 0.2)
    there = LocalStorage(str(tmp_path / "there"))
    log = StoredLog(Gone(str(tmp_path / "gone")), "a.log")
    log.emit(logging.makeLogRecord({"msg": "the first line"}))
    assert Gone.asked.wait(10)
    log.attach(there, "b.log")
    log.emit(logging.makeLogRecord({"msg": "the last line"}))
    started = time.monotonic()
    log.close()
    assert time.monotonic() - started < 10
    assert there.read("b.log").decode().splitlines()[-1].endswith("the last line")
