"""`ray job submit`: the same command on a cluster, the same rows as locally."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.jobs.conftest import RAY, REPOSITORY, TINY, RayHead, generate_command, start_head


@pytest.fixture
def head() -> Iterator[RayHead]:
    with start_head(has_dashboard=True) as head:
        yield head


def submit(head: RayHead, *arguments: str) -> subprocess.CompletedProcess[str]:
    entry = [sys.executable, "-m", "jobs.generate", "conf/emoji.yaml", *arguments]
    command = [RAY, "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--", *entry]
    kept = {name: value for name, value in head.environment.items() if name != "RAY_ADDRESS"}
    return subprocess.run(command, cwd=REPOSITORY, env=kept, capture_output=True, text=True, timeout=900)


def rows(output: Path) -> dict[int, tuple[str, int, bytes]]:
    columns = ["position", "strategy", "seed", "image"]
    tables = [pq.read_table(path, columns=columns) for path in sorted((output / "data").glob("*.parquet"))]
    return {
        row["position"]: (row["strategy"], row["seed"], row["image"]["bytes"])
        for table in tables
        for row in table.to_pylist()
    }


def test_a_submitted_job_makes_the_rows_of_a_local_run(head: RayHead, tmp_path: Path) -> None:
    submitted = submit(head, *TINY, "input.limit=10", "cluster.replicas.max=2", f"output.path={tmp_path}/cluster")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "succeeded" in (submitted.stdout + submitted.stderr).lower()
    command = generate_command(tmp_path / "out", "input.limit=10", "cluster.address=local")
    local = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert local.returncode == 0, local.stderr
    assert rows(tmp_path / "cluster") == rows(tmp_path / "out")
    assert sorted(rows(tmp_path / "out")) == list(range(10))

    relative = submit(head, *TINY, "output.path=outputs/here")
    assert relative.returncode != 0
    assert "output.path: outputs/here is relative" in relative.stdout + relative.stderr
