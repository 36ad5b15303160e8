"""The S3 server and the proxy of tests/storage serve here too; and the run that nothing disturbed."""

from collections.abc import Callable
from pathlib import Path

import pytest
from storage.conftest import bucket, config, credentials, proxied, proxy, server  # noqa: F401 (fixtures)

from faults.running import rows, run
from skipvar.types import RequestKey
from tests.jobs.conftest import RayHead, ray_head  # noqa: F401 (a fixture)

Rows = dict[RequestKey, tuple[str, str, int, str]]


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 prompts of different lengths."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    colours, things = ("red", "green", "blue", "yellow", "black"), ("apple", "car", "dog", "house", "bright star")
    lines = [f"{1 + i % 4} {colours[i % 5]} {things[i // 5 % 5]}, number {i}" for i in range(500)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def on_cluster(ray_head: RayHead) -> dict[str, str]:  # noqa: F811
    """The environment of a job that joins one Ray, which these tests share. Its replicas have no S3 credentials."""
    return {name: value for name, value in ray_head.environment.items() if name.startswith("RAY_")}


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory, prompts: Path, on_cluster: dict[str, str]) -> Callable[[int], Rows]:
    """The rows of an undisturbed run over so many prompts."""
    made: dict[int, Rows] = {}

    def rows_of(limit: int) -> Rows:
        if limit not in made:
            output = tmp_path_factory.mktemp("calm") / "out"
            arguments = (f"input.path={prompts}", f"input.limit={limit}", f"output.path={output}")
            code, said = run(*arguments, timeout=1500, environment=on_cluster)
            assert code == 0, said
            made[limit] = rows(str(output))
        return made[limit]

    return rows_of
