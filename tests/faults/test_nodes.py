"""Several raylets on this machine: nodes join, announce that they go, and die, while a run is under way."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from faults.running import REPOSITORY, kill_tree, rows

NUM_PROMPTS = 240
UNIT_ROWS = 8
PATIENCE_SECONDS = 300.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without room for replicas, and no node yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_health_check_period_ms", "500")
        patch.setenv("RAY_health_check_initial_delay_ms", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        yield cluster
        cluster.shutdown()


class NodeJob:
    """A run of node_job.py, as it goes."""

    def __init__(self, folder: Path, cluster: Cluster, *overrides: str, step_seconds: float = 0.9) -> None:
        folder.mkdir(exist_ok=True)
        self.output = folder / "out"
        self.pause = folder / "pause"
        (folder / "prompts.txt").write_text("".join(f"prompt {n}\n" for n in range(NUM_PROMPTS)))
        (folder / "run.yaml").write_text(
            f"input: {{path: {folder}/prompts.txt}}\n"
            f"output: {{path: {self.output}, unit_rows: {UNIT_ROWS}}}\n"
            "model: {path: 'random:0', device: cpu}\n"
            f"cluster: {{address: '{cluster.address}'}}\n"
            "max_attempts: 1\n"  # a loss that counted would show: its units would be made alone
        )
        self.process = subprocess.Popen(
            [sys.executable, "tests/faults/node_job.py", str(folder / "run.yaml"), *overrides],
            cwd=REPOSITORY,
            env={**os.environ, "STEP_SECONDS": str(step_seconds), "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def num_units(self) -> int:
        return len(list((self.output / "data").glob("*.parquet")))

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in (self.output / "_log").glob("*-driver.log"))

    def wait_until(self, is_so: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_so() and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if not is_so():
            kill_tree(self.process)
            raise AssertionError("it did not come to that")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No step begins: the run stands where it is, however long this takes."""
        self.pause.touch()
        yield
        self.pause.unlink()

    def end(self) -> str:
        """Wait for its good end; the driver's log."""
        said, _ = self.process.communicate(timeout=PATIENCE_SECONDS)
        assert self.process.returncode == 0, said
        return self.log


def drain(cluster: Cluster, node: Any) -> None:
    command = [
        str(Path(sys.executable).parent / "ray"), "drain-node", "--address", cluster.address, "--node-id", node.node_id,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test", "--deadline-remaining-seconds", "60",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def test_nodes_come_and_go(cluster: Cluster, tmp_path: Path) -> None:
    """One node is drained, one joins, one dies without a word: the rows and pixels of a run that nothing disturbed."""
    drained, lost = (cluster.add_node(num_cpus=2) for _ in range(2))
    calm = NodeJob(tmp_path / "calm", cluster, step_seconds=0.0)
    assert calm.end().count(" is up (") == 4  # both nodes are in use
    undisturbed = rows(str(calm.output))
    assert len(undisturbed) == NUM_PROMPTS

    job = NodeJob(tmp_path / "disturbed", cluster)
    job.wait_until(lambda: job.num_units >= 2)
    with job.paused():
        drain(cluster, drained)
        job.wait_until(lambda: job.log.count("its node is going") >= 2)
    job.wait_until(lambda: job.log.count("was preempted") >= 2)
    with job.paused():
        joined = cluster.add_node(num_cpus=2)
        job.wait_until(lambda: job.log.count(" is up (") >= 6)
        before = job.num_units
    job.wait_until(lambda: job.num_units > before)
    with job.paused():
        cluster.remove_node(lost, allow_graceful=False)
        job.wait_until(lambda: job.log.count("was preempted") >= 4)
    log = job.end()
    cluster.remove_node(drained)
    cluster.remove_node(joined)

    assert rows(str(job.output)) == undisturbed
    assert log.count("publishes what is complete: its node is going") == 2
    assert " is lost (" not in log, "a node that went away counted as a failure"
    assert log.count("was preempted") == 4 and log.count(" is up (") >= 6
