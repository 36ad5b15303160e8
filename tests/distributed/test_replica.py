"""What a replica does around its worker: its last word comes when nothing of it is being written any more."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import FakeEngine

from skipvar.distributed import replica as replica_module
from skipvar.distributed.messages import Started, Stop, Stopped
from skipvar.distributed.replica import Replica
from skipvar.shards.storage import LocalStorage


class SlowStorage(LocalStorage):
    def replace(self, name: str, data: bytes) -> None:
        time.sleep(0.5)
        super().replace(name, data)


def test_the_log_is_there_before_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver ends a replica at its last word: what it still wrote then stayed in `_tmp/`, and the log was lost."""
    monkeypatch.setattr(replica_module, "open_storage", lambda *_: SlowStorage(str(tmp_path)))
    context = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr(replica_module.ray, "get_runtime_context", lambda: context)
    dataset = SimpleNamespace(output=str(tmp_path), storage=None)
    order: Any = SimpleNamespace(dataset=dataset, input=dataset, session="now", wanted_requests=lambda _: 8)
    replica = Replica("replica-0", FakeEngine, order, 1)
    assert isinstance(replica._outbox.get(timeout=60)[0], Started)
    replica_module.logger.info("a line")
    assert replica._worker is not None
    replica._worker.post(Stop())
    assert isinstance(replica._outbox.get(timeout=60)[0], Stopped)
    assert [path.read_text().count("a line") for path in (tmp_path / "_log").iterdir()] == [1]
    assert not list((tmp_path / "_tmp").iterdir())
