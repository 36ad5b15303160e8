"""`ray start --head` and `ray job submit`: the same command on a cluster, the same rows as locally."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.jobs.conftest import REPOSITORY, TINY

RAY = str(Path(sys.executable).with_name("ray"))
START_SECONDS = 90


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def submit() -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """A cluster of one node on loopback, with Ray's token authentication, and `ray job submit` to it."""
    gcs, dashboard, agent, client = free_ports(4)
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: Ray's sockets must fit in 107 characters
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {**kept, **token}
    head = subprocess.Popen(
        [
            *(RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--num-cpus=2"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
            *(f"--ray-client-server-port={client}", "--object-store-memory=100000000", f"--temp-dir={folder}"),
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{dashboard}"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        entry = [sys.executable, "-m", "jobs.generate", "conf/emoji.yaml", *arguments]
        command = [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", *entry]
        return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240)

    try:
        wait_for(f"{address}/api/version", token["RAY_AUTH_TOKEN"])
        yield run
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(url: str, token: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
            urllib.request.urlopen(request, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < deadline, "the Ray head does not come up"
            time.sleep(0.5)


def rows(output: Path) -> dict[int, tuple[str, int, bytes]]:
    columns = ["position", "strategy", "seed", "image"]
    tables = [pq.read_table(path, columns=columns) for path in sorted((output / "data").glob("*.parquet"))]
    return {
        row["position"]: (row["strategy"], row["seed"], row["image"]["bytes"])
        for table in tables
        for row in table.to_pylist()
    }


def test_a_submitted_job_makes_the_rows_of_a_local_run(submit, generate, tmp_path: Path) -> None:
    submitted = submit(*TINY, "input.limit=10", "cluster.replicas.max=2", f"output.path={tmp_path}/cluster")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "succeeded" in (submitted.stdout + submitted.stderr).lower()
    local = generate("input.limit=10")
    assert local.returncode == 0, local.stderr
    assert rows(tmp_path / "cluster") == rows(tmp_path / "out")
    assert sorted(rows(tmp_path / "out")) == list(range(10))

    relative = submit(*TINY, "output.path=outputs/here")
    assert relative.returncode != 0
    assert "output.path: outputs/here is relative" in relative.stdout + relative.stderr
