"""Resume, refusal, retries, the end of a run, and the lease."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from shards.making import Job, draw, make_config, make_dataset, write
from skipvar.errors import ConfigError, StorageError
from skipvar.shards.lease import Lease, LeaseHeldError, acquire
from skipvar.shards.ledger import Ledger
from skipvar.shards.record import InputIdentity, RunRecord, fingerprint
from skipvar.shards.storage import LocalStorage
from skipvar.types import Failure, Request

PARTS: dict[str, Any] = {"sampling": {"cfg": 3.0, "seed": 0}, "policy": {"name": "p", "sha256": "aa"}, "weights": "w1"}


def start(tmp_path: Path, parts: Any = None, text: str = "a\nb bad\nc\n", **values: Any) -> Job:
    path = write(tmp_path / "a.txt", text)
    config = make_config(input__path=path, output__path=str(tmp_path / "out"), output__unit_rows=2, **values)
    return Job(config, parts=PARTS if parts is None else parts)


def test_the_same_run_is_resumed_where_it_stood(tmp_path: Path) -> None:
    first = start(tmp_path)
    assert not first.record.is_resumed
    first.make_unit(first.plan.unit(1))
    second = start(tmp_path)
    assert second.record.is_resumed and second.record.fingerprint == first.record.fingerprint
    assert second.ledger.done_units() == {1}
    assert [report.unit for report in second.make_units()] == [0]
    record = second.ledger.read_run()
    assert record and record.resolved == {"dtype": "float32"} and record.state == "running"


def test_another_torch_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = start(tmp_path)
    for version in (None, "9.1"):
        Ledger(job.storage).open_run(job.new_record(**({"torch": version} if version else {})))
    assert [record.message for record in caplog.records] == [
        "this run began with torch None and goes on with 9.1: pixels may round otherwise"
    ]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sampling": {"cfg": 4.0, "seed": 0}}, "sampling.cfg: 3.0 -> 4.0"),
        ({"sampling": {"cfg": [3.0, 1.0], "seed": 0}}, "sampling.cfg: 3.0 -> [3.0, 1.0]"),
        ({"policy": {"name": "p", "sha256": "bb"}}, 'policy.sha256: "aa" -> "bb"'),
        ({"weights": "w2"}, 'weights: "w1" -> "w2"'),
        ({"new": 1}, "new: (none) -> 1"),
    ],
)
def test_another_run_is_refused_by_what_differs(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    start(tmp_path)
    with pytest.raises(ConfigError) as error:
        start(tmp_path, {**PARTS, **change})
    assert named in str(error.value) and "output.path" in str(error.value)
    assert str(error.value).count("->") == 1


@pytest.mark.parametrize("with_identity", [True, False])
def test_a_changed_input_is_refused_by_name(tmp_path: Path, with_identity: bool) -> None:
    start(tmp_path)
    with pytest.raises(ConfigError, match=r"input\.files\[a\.txt\]\.sha256"):
        start(tmp_path, text="a\nb bad\nC\n")
    with pytest.raises(ConfigError, match=r"input\.prompts_per_unit: 2 -> 1"):
        start(tmp_path, sampling__images_per_prompt=2)


def test_fingerprints() -> None:
    assert fingerprint({"a": 1, "b": [1.5]}) == fingerprint({"b": [1.5], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert len(fingerprint({})) == 16


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out" / "data").mkdir(parents=True)
    write(tmp_path / "out" / "data" / "mine.parquet", "x")
    with pytest.raises(ConfigError, match=r"no _run\.json"):
        start(tmp_path)
    write(tmp_path / "out" / "_run.json", "{")
    with pytest.raises(StorageError, match="not valid JSON"):
        start(tmp_path)


def test_retries_supersede_what_they_list(tmp_path: Path) -> None:
    job = make_dataset(tmp_path, ["a", "b bad", "c bad", "d", "e bad"])
    assert {failed.unit: set(failed.keys) for failed in job.ledger.failed_requests()} == {
        0: {(1, 0), (2, 0)},
        1: {(4, 0)},
    }
    before = {entry.name: entry for entry in job.storage.list("data/")}

    def make(request: Request) -> Any:
        return Failure.of(request, ValueError("still")) if request.position == 2 else draw(request)

    job.make = make
    assert [report.num_images for report in job.make_units(job.ledger.retry_units(job.plan))] == [1, 1]
    assert [(failed.unit, set(failed.keys), failed.next_retry) for failed in job.ledger.failed_requests()] == [
        (0, {(2, 0)}, 2)
    ]
    assert {entry.name: entry for entry in job.storage.list("data/") if "retry" not in entry.name} == before
    job.make = draw
    units = list(job.ledger.retry_units(job.plan))
    assert [(unit.index, unit.only, unit.retry) for unit in units] == [(0, frozenset({(2, 0)}), 2)]
    job.make_units(units)
    assert job.ledger.num_errors() == 0
    before = list(job.storage.list("data/"))
    assert job.make_unit(units[0]).same_content and list(job.storage.list("data/")) == before


def test_an_error_file_without_its_data_file_does_not_count(tmp_path: Path) -> None:
    job = start(tmp_path)
    report = job.make_unit(job.plan.unit(0))
    (tmp_path / "out" / "data" / "unit-000000000.parquet").unlink()
    assert report.num_failures == 1 and job.ledger.num_errors() == 0
    job.make_unit(job.plan.unit(0))
    assert job.ledger.num_errors() == 1
    assert len(list(job.storage.list("errors/"))) == 2


def test_the_end_is_recorded_and_success_comes_last(tmp_path: Path) -> None:
    job = start(tmp_path)
    job.ledger.finish("stopped", {"images": 0})
    assert not job.ledger.is_finished() and not list(job.storage.list("README.md"))
    job.make_units()
    job.ledger.finish("finished_with_errors", {"images": 2, "errors": 1, "note": "a|b\n<script>"})
    record = job.ledger.read_run()
    assert record and record.state == "finished_with_errors"
    assert job.ledger.is_finished() and json.loads(job.storage.read("_SUCCESS"))["counts"]["images"] == 2
    card = job.storage.read("README.md").decode()
    assert "data/*.parquet" in card and "<script>" not in card


# ---- the lease ----


class Sleep:
    """Sleeps, and counts for how long it was asked to: unlike a clock, the same on a busy machine."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, seconds: float) -> None:
        self.seconds += seconds
        time.sleep(seconds)


def test_a_lease_is_taken_released_and_taken_again(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    lease = acquire(storage, stale_seconds=5)
    assert lease.beat()
    lease.release()
    assert not lease.beat()
    sleep = Sleep()
    assert acquire(storage, stale_seconds=5, sleep=sleep).beat()
    assert sleep.seconds == 0


def test_a_living_run_keeps_others_out(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    lease = acquire(storage, stale_seconds=2.0)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(lease.interval_seconds):
            lease.beat()

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        started, sleep = time.monotonic(), Sleep()
        with pytest.raises(LeaseHeldError, match=r"host \S+, process \d+, started"):
            acquire(storage, stale_seconds=2.0, sleep=sleep)
        assert time.monotonic() - started > 1.9 and sleep.seconds < 2.5
        assert lease.beat()
    finally:
        stop.set()
        thread.join()


def test_a_dead_run_is_taken_over_and_finds_out(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    dead = acquire(storage, stale_seconds=0.3)
    started, sleep = time.monotonic(), Sleep()
    alive = acquire(storage, stale_seconds=0.3, sleep=sleep)
    assert time.monotonic() - started > 0.25 and sleep.seconds < 0.5
    assert alive.beat() and not dead.beat()
    dead.release()  # must not touch what is another's now
    assert alive.beat()


def test_a_lease_that_is_let_go_is_whoever_s_comes_first(tmp_path: Path) -> None:
    """Also where it was taken over before, so that the next one's number is a lower one: no two hold it."""
    storage = LocalStorage(str(tmp_path))
    acquire(storage, stale_seconds=0.05)
    holder = acquire(storage, stale_seconds=0.05)
    first: list[Lease] = []

    def between_two_looks(seconds: float) -> None:
        if not first:
            holder.release()
            first.append(acquire(storage, stale_seconds=5))
        assert first[0].beat()
        time.sleep(seconds)

    with pytest.raises(LeaseHeldError):
        acquire(storage, stale_seconds=0.3, sleep=between_two_looks)
    assert first[0].beat()


def test_a_killed_process_of_this_machine_is_not_waited_for(tmp_path: Path) -> None:
    code = f"""
import os, signal
from skipvar.shards.lease import acquire
from skipvar.shards.storage import LocalStorage
acquire(LocalStorage({str(tmp_path)!r}), 60)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    sleep = Sleep()
    assert acquire(LocalStorage(str(tmp_path)), 60, sleep).beat()
    assert sleep.seconds == 0


def test_of_many_only_one_gets_the_lease(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    dead = acquire(storage, stale_seconds=1.0)
    outcomes: list[Any] = []

    def watch() -> None:
        try:
            lease = acquire(storage, stale_seconds=1.0)
        except LeaseHeldError as error:
            outcomes.append(error)
            return
        outcomes.append(lease)
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            assert lease.beat()
            time.sleep(0.05)

    threads = [threading.Thread(target=watch) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sum(isinstance(outcome, LeaseHeldError) for outcome in outcomes) == 5 and len(outcomes) == 6
    assert not dead.beat()


def test_runs_that_begin_at_once_agree(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "out"))
    runs: list[Any] = []
    identity = InputIdentity(num_rows=1, prompts_per_unit=1, images_per_prompt=1, columns={})
    record = RunRecord(fingerprint=fingerprint(PARTS), parts=PARTS, input=identity)
    threads = [threading.Thread(target=lambda: runs.append(Ledger(storage).open_run(record)[0])) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(runs) == 6 and len({run.fingerprint for run in runs}) == 1
    assert [run.is_resumed for run in runs].count(False) == 1
