"""Running a job as a user does: in a process of its own, on one Ray that the jobs of this folder share."""

import contextlib
import http.client
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults.running import kill_tree

REPOSITORY = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
START_SECONDS = 300
TINY = ("model.path=random:0", "policy=spread", "cluster.replicas.max=1", "output.unit_rows=4", "model.device=cpu")
"""Overrides for conf/emoji.yaml: seeded random weights, one replica, small units."""


@dataclass(frozen=True)
class RayHead:
    """A Ray of one node on loopback, with token authentication."""

    environment: Mapping[str, str]
    """Of a process that joins it."""
    dashboard: str
    """Where jobs are submitted to, where it has a dashboard."""


def _free_ports(count: int) -> list[int]:
    """Below those that the system hands out, of which another Ray may take one before this one does."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.add(port)
    return list(ports)


@contextlib.contextmanager
def start_head(*, has_dashboard: bool) -> Iterator[RayHead]:
    """`ray start --head`, until the block ends. A dashboard is eight processes more."""
    gcs, dashboard, agent, client = _free_ports(4)
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: Ray's sockets must fit in 107 characters
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "RAY_worker_niceness" or not name.startswith("RAY_")
    }
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        [
            *(RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--num-cpus=2"),
            *(f"--include-dashboard={has_dashboard}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
            *("--object-store-memory=100000000", f"--temp-dir={folder}"),
        ],
        env={**kept, **token},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_until(Path(folder, "session_latest", "sockets", "raylet").exists)
        if has_dashboard:
            _wait_until(lambda: _answers(f"{address}/api/version", token["RAY_AUTH_TOKEN"]))
        yield RayHead({**kept, **token, "RAY_ADDRESS": f"127.0.0.1:{gcs}"}, address)
    finally:
        kill_tree(process)  # asked to end, `ray start` may take more than a minute
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    """One Ray for all tests that ask for it."""
    with start_head(has_dashboard=False) as head:
        yield head


def _answers(url: str, token: str) -> bool:
    try:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
        urllib.request.urlopen(request, timeout=5).close()
    except (http.client.HTTPException, OSError):
        return False
    return True


def _wait_until(is_up: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_up():
        assert time.monotonic() < deadline, "the Ray head does not come up"
        time.sleep(0.5)


@pytest.fixture
def generate(ray_head: RayHead, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs jobs.generate on conf/emoji.yaml with overrides, into `tmp_path/out`, on the shared Ray unless it is told
    `cluster.address=local`."""

    def run(*arguments: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            generate_command(tmp_path / "out", *arguments),
            cwd=REPOSITORY,
            env=dict(ray_head.environment),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


def generate_command(output: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "jobs.generate", "conf/emoji.yaml", *TINY, f"output.path={output}", *arguments]
