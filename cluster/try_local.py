"""The whole deployment on one machine, without Kubernetes: `make setup-dev && .venv/bin/python cluster/try_local.py`.

Starts an S3 server (SeaweedFS), a Ray head and a second Ray node with the parameters of cluster/raycluster.yaml, and
runs the command of cluster/nightly.yaml with the embedded model in place of Infinity. All on loopback, in a folder of
its own, and gone at the end; --keep leaves it running, for a look at the dashboard, until Ctrl-C.
"""

import argparse
import contextlib
import datetime
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import boto3
import yaml
from botocore.exceptions import BotoCoreError, ClientError

CLUSTER = Path(__file__).resolve().parent
REPOSITORY = CLUSTER.parent
BIN = Path(sys.executable).parent
START_SECONDS = 90.0
TERM_SECONDS = 30.0
EMBEDDED = (
    *("model.name=emoji", "model.path=null", "model.dtype=float32", "model.device=cpu", "sampling.size=null"),
    *("policy=conf/policies/emoji_0.86.json", "output.unit_rows=8", "cluster.cpus_per_replica=1"),
)
"""What a machine without a GPU and without Infinity's weights needs of conf/nightly.yaml changed."""


class Deployment:
    """S3, a head and one other node; `night` runs the command of the nightly pod. Use it as a context manager."""

    def __init__(self, num_cpus: int = 2) -> None:
        """`num_cpus`: of the second node, so that many replicas."""
        self._num_cpus = num_cpus
        self.folder = Path(tempfile.mkdtemp(prefix="try-", dir="/tmp"))  # short: Ray's sockets fit in 107 characters
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        names = ("gcs", "dashboard", "client", "head_agent", "node_agent", "head_metrics", "node_metrics")
        self.ports = dict(zip(names, _free_ports(len(names)), strict=True))
        self._s3_ports = {name: _free_port_pair() for name in ("s3", "master", "volume", "filer")}
        self.dashboard = f"http://127.0.0.1:{self.ports['dashboard']}"
        self.environment = self._environment()

    def __enter__(self) -> "Deployment":
        try:
            self._start_s3()
            self._start_head()
            self._start_node()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def put_prompts(self, date: str, num_prompts: int) -> None:
        """The first prompts of conf/prompts/emoji.txt, as the night of `date` finds them."""
        lines = (REPOSITORY / "conf/prompts/emoji.txt").read_text().splitlines()[:num_prompts]
        body = "".join(json.dumps({"prompt": line}) + "\n" for line in lines)
        self.s3().put_object(Bucket="prompts", Key=f"nightly/dt={date}/prompts.jsonl", Body=body.encode())

    def night(self, date: str, *overrides: str, submission_id: str | None = None) -> subprocess.Popen[str]:
        """Start what the pod of cluster/nightly.yaml starts."""
        night = yaml.safe_load((CLUSTER / "nightly.yaml").read_text())
        [container] = night["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        *options, line = container["args"]
        options[0] = f"--address={self.dashboard}"
        if submission_id is not None:
            options[1] = f"--submission-id={submission_id}"
        line = line.replace("/home/ray/skipvar", str(REPOSITORY)).replace("exec python", f"exec {sys.executable}")
        line = " ".join([line.replace("*.parquet", "*.jsonl"), *EMBEDDED, *overrides])
        [_, *command] = container["command"]
        return subprocess.Popen(
            [sys.executable, *command, f"--date={date}", *options, line],
            cwd=REPOSITORY, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command of this repository's environment, with the deployment's credentials, and wait for it."""
        first = sys.executable if command[0] == "python" else str(BIN / command[0])
        return subprocess.run(
            [first, *command[1:]], cwd=REPOSITORY, env=self.environment, text=True, capture_output=True, timeout=300
        )

    def s3(self) -> Any:
        names = {"aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY"}
        keys = {name: self.environment[variable] for name, variable in names.items()}
        return boto3.client("s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"], region_name="us-east-1", **keys)

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
        spec = yaml.safe_load_all((CLUSTER / "raycluster.yaml").read_text()).__next__()["spec"]
        [head] = spec["headGroupSpec"]["template"]["spec"]["containers"]
        return {
            **kept,
            **{each["name"]: each["value"] for each in head["env"] if "value" in each},
            "RAY_AUTH_MODE": spec["authOptions"]["mode"],
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "AWS_ACCESS_KEY_ID": "TRYLOCAL",
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._s3_ports['s3']}",
            "PYTHONPATH": str(REPOSITORY),
            "OMP_WAIT_POLICY": "passive",
            "SKIPVAR_CACHE": str(self.folder / "cache"),
        }

    def _start_s3(self) -> None:
        keys = {"accessKey": self.environment["AWS_ACCESS_KEY_ID"]}
        keys["secretKey"] = self.environment["AWS_SECRET_ACCESS_KEY"]
        users = {"identities": [{"name": "try", "credentials": [keys], "actions": ["Admin"]}]}
        (self.folder / "s3").mkdir()
        (self.folder / "s3.json").write_text(json.dumps(users))
        self._spawn(
            "s3", str(BIN / "weed"), "server", f"-dir={self.folder / 's3'}", "-ip=127.0.0.1", "-volume.max=20",
            "-master.volumeSizeLimitMB=64", "-master.telemetry=false", "-s3", f"-s3.config={self.folder / 's3.json'}",
            "-s3.port.iceberg=0", "-s3.port.lance=0",
            *(f"-{name}.port={port}" for name, port in self._s3_ports.items()),
        )  # fmt: skip
        for bucket in ("prompts", "datasets"):
            _until(f"the S3 server takes the bucket {bucket}", lambda name=bucket: self._make_bucket(name))

    def _make_bucket(self, name: str) -> bool:
        try:
            client = self.s3()
            if name not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
                client.create_bucket(Bucket=name)
            client.put_object(Bucket=name, Key="_ready", Body=b"")  # volumes come up after the gateway
            client.delete_object(Bucket=name, Key="_ready")
            return True
        except (BotoCoreError, ClientError):
            return False

    def _start_head(self) -> None:
        self._spawn(
            "head", *self._ray_start("headGroupSpec", "head"), "--head", f"--port={self.ports['gcs']}",
            f"--dashboard-port={self.ports['dashboard']}", f"--ray-client-server-port={self.ports['client']}",
            f"--temp-dir={self.folder / 'ray'}", "--dashboard-host=127.0.0.1",
        )  # fmt: skip
        _until("the head answers", lambda: self._has_nodes(1))

    def _start_node(self) -> None:
        self._spawn(
            "node", *self._ray_start("workerGroupSpecs", "node"),
            f"--address=127.0.0.1:{self.ports['gcs']}", f"--num-cpus={self._num_cpus}",
        )  # fmt: skip
        _until("the second node joins", lambda: self._has_nodes(2))

    def _ray_start(self, group: str, who: str) -> list[str]:
        """KubeRay's `ray start` for a group of cluster/raycluster.yaml, on ports of its own."""
        spec = yaml.safe_load_all((CLUSTER / "raycluster.yaml").read_text()).__next__()["spec"][group]
        parameters = (spec[0] if isinstance(spec, list) else spec)["rayStartParams"]
        options = [f"--{name}={value}" for name, value in parameters.items() if name != "dashboard-host"]
        ports = [f"--dashboard-agent-listen-port={self.ports[f'{who}_agent']}"]
        ports.append(f"--metrics-export-port={self.ports[f'{who}_metrics']}")
        return [str(BIN / "ray"), "start", "--block", "--node-ip-address=127.0.0.1", *options, *ports]

    def _has_nodes(self, count: int) -> bool:
        script = "import ray; ray.init(logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))"
        said = subprocess.run(
            [sys.executable, "-c", script],
            env={**self.environment, "RAY_ADDRESS": f"127.0.0.1:{self.ports['gcs']}"},
            capture_output=True, text=True,
        )  # fmt: skip
        return said.stdout.strip() == str(count)

    def _spawn(self, who: str, *command: str) -> None:
        with (self.folder / f"{who}.log").open("ab") as log:
            self._processes[who] = subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )

    def _end(self) -> None:
        for process in reversed(self._processes.values()):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self._processes.values()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TERM_SECONDS)
            with contextlib.suppress(ProcessLookupError):  # what it left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _until(what: str, is_so: Any) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"Waited {START_SECONDS:g} seconds in vain until {what}.")
        time.sleep(0.5)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _free_port_pair() -> int:
    """SeaweedFS listens on each port and on 10,000 above it."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)  # below the ports that the system gives away
        try:
            for candidate in (port, port + 10_000):
                socket.create_server(("127.0.0.1", candidate)).close()
            return port
        except OSError:
            continue


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--keep", action="store_true", help="leave it running until Ctrl-C")
    arguments = parser.parse_args()
    date = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    with Deployment() as deployment:
        deployment.put_prompts(date, arguments.prompts)
        night = deployment.night(date)
        assert night.stdout is not None
        for line in night.stdout:
            print(line, end="")
        code = night.wait()
        verdict = deployment.run("python", "-m", "jobs.verify", f"s3://datasets/nightly/dt={date}", "--full")
        print(f"exit code {code}\n{verdict.stdout}", end="")
        if arguments.keep:
            names = [name for name in deployment.environment if name.startswith(("RAY_AUTH_", "AWS_"))]
            print(f"dashboard: {deployment.dashboard}")
            print(*(f"export {name}={deployment.environment[name]}" for name in names), sep="\n")
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
        return code


if __name__ == "__main__":
    sys.exit(main())
