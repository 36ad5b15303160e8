"""Where local paths lead, on this machine and in a submitted job."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from skipvar.config import OutputConfig, RunConfig
from skipvar.distributed.environment import resolve_paths
from skipvar.errors import ConfigError

POLICY = "conf/policies/emoji_0.86.json"


def submitted(monkeypatch: pytest.MonkeyPatch, runtime_env: dict[str, str]) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": runtime_env, "metadata": {}}))


def test_a_submitted_job_that_brings_its_folder_leaves_paths_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    submitted(monkeypatch, {"working_dir": "gcs://_ray_pkg_0.zip"})
    assert resolve_paths(RunConfig(policy=POLICY, output=OutputConfig(path="/data"))).policy == POLICY


def test_a_submitted_job_of_an_image_names_its_files_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cluster/rayjob.yaml does it: replicas start in another folder than the driver."""
    submitted(monkeypatch, {})
    config = resolve_paths(RunConfig(policy=POLICY, output=OutputConfig(path="s3://bucket/data")))
    assert config.policy == str(Path(POLICY).absolute())
    assert config.output.path == "s3://bucket/data"


@pytest.mark.parametrize("runtime_env", [{}, {"working_dir": "gcs://_ray_pkg_0.zip"}])
def test_a_submitted_job_refuses_a_relative_output(
    monkeypatch: pytest.MonkeyPatch, runtime_env: dict[str, str]
) -> None:
    submitted(monkeypatch, runtime_env)
    config = replace(RunConfig(), output=OutputConfig(path="outputs/here"))
    with pytest.raises(ConfigError, match="outputs/here is relative"):
        resolve_paths(config)
