"""cluster/try_local.py: S3, a head without processors, a second node; the night's own command and Ray's own tools."""

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from cluster.manifests import CLUSTER

DATE = "2026-11-24"
OUTPUT = f"datasets/nightly/dt={DATE}"


def load() -> ModuleType:
    specification = importlib.util.spec_from_file_location("try_local", CLUSTER / "try_local.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["try_local"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def deployment() -> Iterator[object]:
    with load().Deployment() as running:
        running.put_prompts(DATE, 24)
        yield running


def ended(night) -> tuple[int, str]:
    said = night.communicate(timeout=500)[0]
    return night.returncode, said


@pytest.mark.faults
def test_two_nights_at_once_and_a_third_make_one_dataset(deployment) -> None:
    first = deployment.night(DATE)
    second = deployment.night(DATE)  # joins the first by its name
    code, said = ended(first)
    assert code == 0, said
    assert ended(second)[0] == 0
    third, said = ended(deployment.night(DATE))
    assert third == 0 and "has ended before" in said
    fourth, said = ended(deployment.night(DATE, submission_id="by-hand-{date}"))  # finds all units made
    assert fourth == 0 and "0 images" in said

    verdict = deployment.run("python", "-m", "jobs.verify", f"s3://{OUTPUT}", "--full")
    assert verdict.returncode == 0, verdict.stdout
    keys = {name: deployment.environment[f"AWS_{name.upper()}"] for name in ("access_key_id", "secret_access_key")}
    s3 = pyarrow.fs.S3FileSystem(
        access_key=keys["access_key_id"],
        secret_key=keys["secret_access_key"],
        endpoint_override=deployment.environment["AWS_ENDPOINT_URL"],
        region="us-east-1",
    )
    table = pq.read_table(f"{OUTPUT}/data", filesystem=s3, columns=["position"])
    assert sorted(table["position"].to_pylist()) == list(range(24))


@pytest.mark.faults
def test_a_night_that_is_told_to_end_stops_in_order_and_the_next_resumes(deployment) -> None:
    date = "2026-11-25"
    deployment.put_prompts(date, 24)
    night = deployment.night(date)
    for line in night.stdout:
        if " is up (" in line:
            break
    night.terminate()
    code, said = ended(night)
    assert code == 4, said
    code, said = ended(deployment.night(date))
    assert code == 0, said
    assert "was stopped or failed before" in said and "Resum" in said


def test_the_nodes_are_started_with_the_parameters_of_the_manifests() -> None:
    local = load().Deployment()
    head, node = local._ray_start("headGroupSpec", "head"), local._ray_start("workerGroupSpecs", "node")
    local._end()
    assert "--num-cpus=0" in head and "--object-store-memory=200000000" in head
    assert "--object-store-memory=200000000" in node
    assert local.environment["RAY_AUTH_MODE"] == "token" and local.environment["RAY_JOB_STOP_WAIT_TIME_S"] == "120"
