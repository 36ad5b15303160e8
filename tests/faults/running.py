"""Whole jobs in processes of their own, and what they leave behind."""

import contextlib
import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow.parquet as pq

from skipvar.config import StorageConfig
from skipvar.shards.encode import decode_image
from skipvar.shards.storage import open_storage
from skipvar.types import RequestKey

REPOSITORY = Path(__file__).parents[2]
STALE_SECONDS = 4
TINY = (
    "model.path=random:0",
    "policy=spread",
    "model.device=cpu",
    "cluster.replicas.max=1",
    "output.unit_rows=4",
    "engine.batch_size=4",
    f"storage.lease_stale_seconds={STALE_SECONDS}",
)
"""Overrides for conf/emoji.yaml: seeded random weights, one replica, small units, a short wait for dead runs."""


def start(*arguments: str, environment: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
    """Start jobs.generate on conf/emoji.yaml, on a Ray of its own or on the one that `environment` names; what it says
    goes to one pipe."""
    address = "auto" if environment and "RAY_ADDRESS" in environment else "local"
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.generate", "conf/emoji.yaml", *TINY, f"cluster.address={address}", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*arguments: str, timeout: float = 900.0, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run jobs.generate to its end: the exit code and what it said."""
    process = start(*arguments, environment=environment)
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        raise
    return process.returncode, said


def kill_tree(process: "subprocess.Popen[str]") -> None:
    """End a job and all that it started (Ray's processes too) as a power cut would."""
    for pid in [*descendants(process.pid), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def descendants(pid: int) -> list[int]:
    """The processes below one, the deepest first."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))

    def below(parent: int) -> Iterator[int]:
        for child in children.get(parent, []):
            yield from below(child)
            yield child

    return list(below(pid))


def rows(uri: str, config: StorageConfig | None = None) -> dict[RequestKey, tuple[str, str, int, str]]:
    """Of every request its id, strategy, seed and a hash of its pixels; no request stands twice."""
    storage = open_storage(uri, config or StorageConfig())
    found: dict[RequestKey, tuple[str, str, int, str]] = {}
    for entry in storage.list("data/"):
        for row in pq.read_table(io.BytesIO(storage.read(entry.name))).to_pylist():
            key = (row["position"], row["image_index"])
            assert key not in found, key
            pixels = hashlib.sha256(decode_image(row["image"]["bytes"]).tobytes()).hexdigest()
            found[key] = (row["id"], row["strategy"], row["seed"], pixels)
    return found


def published(output: Path) -> dict[str, bytes]:
    """The data files as they are."""
    return {path.name: path.read_bytes() for path in (output / "data").glob("*.parquet")}


def wait_for_units(output: Path, count: int, process: "subprocess.Popen[str]", timeout: float = 900.0) -> None:
    """Until so many units are published, or the job has ended. The patience is that of a machine with other work."""
    deadline = time.monotonic() + timeout
    while len(list((output / "data").glob("*.parquet"))) < count and process.poll() is None:
        if time.monotonic() > deadline:
            kill_tree(process)
            raise AssertionError(f"no {count} units within {timeout} s")
        time.sleep(0.05)
