"""Replicas that are killed, abort or freeze while a run with the fake engine is under way, on a Ray of its own."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from faults.running import REPOSITORY, descendants, kill_tree, rows
from skipvar.types import RequestKey

PATIENCE_SECONDS = 900.0


def start(folder: Path, prompts: list[str], *overrides: str, step_seconds: float = 0.0) -> "subprocess.Popen[str]":
    """A run of node_job.py in a local Ray, into `folder/out`."""
    folder.mkdir()
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    (folder / "run.yaml").write_text(
        f"input: {{path: {folder}/prompts.txt}}\n"
        f"output: {{path: {folder}/out, unit_rows: 8}}\n"
        "model: {path: 'random:0', device: cpu}\n"
        "cluster: {address: local, replicas: {max: 4}}\n"
    )
    return subprocess.Popen(
        [sys.executable, "tests/faults/node_job.py", str(folder / "run.yaml"), *overrides],
        cwd=REPOSITORY,
        env={**os.environ, "STEP_SECONDS": str(step_seconds), "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: "subprocess.Popen[str]", code: int) -> str:
    try:
        said, _ = process.communicate(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        raise
    assert process.returncode == code, said
    return said


def replicas(process: "subprocess.Popen[str]") -> list[int]:
    """The processes of a job's replicas, the oldest first."""
    found = []
    for pid in descendants(process.pid):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        except OSError:
            continue
        if title.startswith("ray::Replica"):
            found.append(pid)
    return sorted(found)


def units(folder: Path) -> int:
    return len(list((folder / "out" / "data").glob("*.parquet")))


def undisturbed(folder: Path, prompts: list[str]) -> dict[RequestKey, tuple[str, str, int, str]]:
    end(start(folder, prompts), 0)
    return rows(str(folder / "out"))


def killed_again_and_again(
    tmp_path: Path, *, num_prompts: int, num_kills: int, every_seconds: float, step_seconds: float
) -> None:
    """SIGKILL of one replica after the other: exit 0 and the dataset of a calm run, every request once."""
    prompts = [f"prompt {n}" for n in range(num_prompts)]
    calm = undisturbed(tmp_path / "calm", prompts)
    assert len(calm) == num_prompts
    process = start(tmp_path / "killed", prompts, step_seconds=step_seconds)
    num_killed = 0
    killed: set[int] = set()
    deadline = time.monotonic() + num_kills * every_seconds + PATIENCE_SECONDS
    while process.poll() is None and num_killed < num_kills and time.monotonic() < deadline:
        alive = [pid for pid in replicas(process) if pid not in killed]
        if alive and units(tmp_path / "killed") > 0:
            os.kill(alive[num_killed % len(alive)], signal.SIGKILL)
            killed.add(alive[num_killed % len(alive)])
            num_killed += 1
        time.sleep(every_seconds)
    end(process, 0)
    assert num_killed == num_kills
    assert rows(str(tmp_path / "killed" / "out")) == calm


def test_three_kills(tmp_path: Path) -> None:
    killed_again_and_again(tmp_path, num_prompts=60, num_kills=3, every_seconds=1.0, step_seconds=2.0)


@pytest.mark.faults
def test_a_hundred_kills(tmp_path: Path) -> None:
    killed_again_and_again(tmp_path, num_prompts=2000, num_kills=100, every_seconds=3.0, step_seconds=1.0)


def deadly_prompts_alone_are_lost(tmp_path: Path, *, num_prompts: int, deadly: set[int]) -> None:
    prompts = [f"die {n}" if n in deadly else f"prompt {n}" for n in range(num_prompts)]
    end(start(tmp_path / "deadly", prompts), 3)
    assert sorted(position for position, _ in rows(str(tmp_path / "deadly" / "out"))) == sorted(
        set(range(num_prompts)) - deadly
    )
    failed: list[tuple[int, str]] = []
    for path in (tmp_path / "deadly" / "out" / "data").glob("*.parquet"):
        if named := (pq.read_metadata(path).metadata or {}).get(b"skipvar.errors", b"").decode():
            table = pq.read_table(tmp_path / "deadly" / "out" / named).to_pylist()
            failed += [(row["position"], row["error_class"]) for row in table]
    assert sorted(failed) == list(zip(sorted(deadly), itertools.repeat("ReplicaDiedError")))


@pytest.mark.faults
def test_five_prompts_that_abort_the_process_are_the_only_error_rows(tmp_path: Path) -> None:
    deadly_prompts_alone_are_lost(tmp_path, num_prompts=120, deadly={3, 31, 60, 61, 119})


def test_a_frozen_replica_does_not_hold_the_run(tmp_path: Path) -> None:
    """`kill -STOP`: it is ended after `replica_timeout_seconds`, and others make what it had."""
    timeout = 20.0
    prompts = [f"prompt {n}" for n in range(80)]
    limit = f"cluster.replica_timeout_seconds={timeout}"
    process = start(tmp_path / "frozen", prompts, limit, "cluster.replicas.max=2", step_seconds=0.5)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while units(tmp_path / "frozen") == 0 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(replicas(process)[0], signal.SIGSTOP)
    end(process, 0)
    assert len(rows(str(tmp_path / "frozen" / "out"))) == len(prompts)
    [log] = (tmp_path / "frozen" / "out" / "_log").glob("*-driver.log")
    assert log.read_text().count("no step and no publication") == 1
