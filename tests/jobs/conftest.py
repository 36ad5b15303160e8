"""Running a job as a user does: in a process of its own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TINY = ("model.path=random:0", "policy=spread", "cluster.replicas.max=1", "output.unit_rows=4", "model.device=cpu")
"""Overrides for conf/emoji.yaml: seeded random weights, one replica, small units."""


@pytest.fixture
def generate(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs jobs.generate on conf/emoji.yaml with overrides, into `tmp_path/out`."""

    def run(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            generate_command(tmp_path / "out", *arguments),
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


def generate_command(output: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "jobs.generate", "conf/emoji.yaml", *TINY, f"output.path={output}", *arguments]
