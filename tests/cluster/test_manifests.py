"""The manifests fit their schemas, misspelt fields are found, and the files agree with each other."""

import copy
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray

from cluster.manifests import (
    CLUSTER,
    REPOSITORY,
    document,
    documents,
    pod_templates,
    ray_schema,
    validate_core,
    validate_custom,
)
from skipvar.config_file import load_config

KUEUE_KINDS = {"ResourceFlavor", "ClusterQueue", "LocalQueue"}
CUSTOM = [("rayjob.yaml", "RayJob"), ("kueue.yaml", "RayJob"), ("raycluster.yaml", "RayCluster")]
KUBERNETES_FILES = ["rayjob.yaml", "kueue.yaml", "raycluster.yaml", "nightly.yaml"]


@pytest.mark.parametrize("name", KUBERNETES_FILES)
def test_core_kinds_pass_kubernetes_validate_strictly(name: str) -> None:
    for manifest in documents(name):
        if manifest["kind"] not in {"RayJob", "RayCluster", *KUEUE_KINDS}:
            validate_core(manifest)


@pytest.mark.parametrize(("name", "kind"), CUSTOM)
def test_custom_kinds_pass_the_schemas_of_kuberay(name: str, kind: str) -> None:
    validate_custom(document(name, kind))


def test_aws_passes_the_schema_of_ray_up() -> None:
    [config] = documents("aws.yaml")
    jsonschema.validate(config, ray_schema())


@pytest.mark.parametrize(
    "path",
    [
        ("spec", "backoffLimits"),
        ("spec", "rayClusterSpec", "autoscalerOption"),
        ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplica"),
        ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "terminationGracePeriod"),
        ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "lifecycel"),
    ],
)
def test_a_misspelt_field_of_a_ray_job_is_found(path: tuple[str | int, ...]) -> None:
    manifest = copy.deepcopy(document("rayjob.yaml", "RayJob"))
    place: Any = manifest
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = 1
    with pytest.raises(jsonschema.ValidationError, match=str(path[-1])):
        validate_custom(manifest)


def test_a_misspelt_field_of_the_nightly_job_and_of_aws_is_found() -> None:
    manifest = document("nightly.yaml", "CronJob")
    manifest["spec"]["concurencyPolicy"] = manifest["spec"].pop("concurrencyPolicy")
    with pytest.raises(kubernetes_validate.utils.ValidationError, match="concurencyPolicy"):
        validate_core(manifest)
    [config] = documents("aws.yaml")
    config["available_node_types"]["gpu_spot"]["max_worker"] = 1
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate(config, ray_schema())


def test_the_job_behind_the_queue_and_the_cluster_that_stays_are_the_ray_jobs() -> None:
    job, queued = document("rayjob.yaml", "RayJob"), document("kueue.yaml", "RayJob")
    assert queued["spec"] == job["spec"]
    [queue] = [each for each in documents("kueue.yaml") if each["kind"] == "LocalQueue"]
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
    assert queued["metadata"]["namespace"] == queue["metadata"]["namespace"]

    cluster = document("raycluster.yaml", "RayCluster")["spec"]
    cluster.pop("upgradeStrategy")
    alike = json.loads(json.dumps(cluster).replace("skipvar-cluster", "skipvar-run"))
    assert alike == job["spec"]["rayClusterSpec"]


@pytest.mark.parametrize("name", ["rayjob.yaml", "kueue.yaml", "raycluster.yaml"])
def test_the_head_is_guarded_and_the_replicas_announce_that_they_leave(name: str) -> None:
    guard = document(name, "PodDisruptionBudget")["spec"]
    [ray_kind] = [each for each in documents(name) if each["kind"].startswith("Ray")]
    spec = ray_kind["spec"].get("rayClusterSpec", ray_kind["spec"])
    labels = spec["headGroupSpec"]["template"]["metadata"]["labels"]
    assert guard["selector"]["matchLabels"].items() <= labels.items()
    assert set(guard) == {"minAvailable", "selector"} and guard["minAvailable"] == 1
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["autoscalerOptions"]["version"] == "v2"
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        assert not guard["selector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        assert "ray drain-node" in command
        assert int(re.findall(r"sleep (\d+)", command)[0]) < pod["terminationGracePeriodSeconds"]


def test_the_driver_asks_for_as_many_replicas_as_the_clusters_can_have() -> None:
    asked = load_config(REPOSITORY / "conf/nightly.yaml").cluster
    groups = document("rayjob.yaml", "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert asked.replicas.max == sum(group["maxReplicas"] for group in groups)
    [aws] = documents("aws.yaml")
    assert asked.replicas.max == aws["max_workers"] == aws["available_node_types"]["gpu_spot"]["max_workers"]
    [worker] = groups[0]["template"]["spec"]["containers"]
    assert int(worker["resources"]["requests"]["cpu"]) >= asked.cpus_per_replica


def test_deadlines_leave_time_to_stop_in_order() -> None:
    limit = load_config(REPOSITORY / "conf/nightly.yaml").max_seconds
    assert limit is not None
    assert document("rayjob.yaml", "RayJob")["spec"]["activeDeadlineSeconds"] > limit
    night = document("nightly.yaml", "CronJob")["spec"]
    assert limit < night["jobTemplate"]["spec"]["activeDeadlineSeconds"] < 23 * 3600, "one night, one date"
    assert night["concurrencyPolicy"] == "Forbid"


def test_versions_and_images_are_one() -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    image = f"registry.example.com/skipvar:{version}"
    images = [
        container["image"]
        for name in KUBERNETES_FILES
        for manifest in documents(name)
        for template in pod_templates(manifest)
        for container in template["spec"]["containers"]
    ]
    assert set(images) == {image} and len(images) == 9
    [aws] = documents("aws.yaml")
    assert aws["docker"]["image"] == image
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert re.search(rf"^FROM rayproject/ray:{re.escape(ray.__version__)}-py311-cu\d+$", dockerfile, re.M)
    assert document("rayjob.yaml", "RayJob")["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__
    assert f"ray=={ray.__version__}" in (REPOSITORY / "requirements.txt").read_text()


def test_no_secret_stands_in_a_file_and_no_container_runs_as_root() -> None:
    for path in filter(Path.is_file, CLUSTER.iterdir()):
        text = path.read_text()
        assert not re.search(r"AKIA[A-Z0-9]{12}|kind: Secret\b|aws_secret_access_key *[:=] *\S", text), path
    for name in KUBERNETES_FILES:
        for manifest in documents(name):
            for template in pod_templates(manifest):
                assert template["spec"]["securityContext"]["runAsNonRoot"] is True
                assert all(
                    not each["securityContext"]["allowPrivilegeEscalation"] for each in template["spec"]["containers"]
                )


def test_the_image_copies_only_what_is_there() -> None:
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    sent = re.findall(r"^!(.+)$", (CLUSTER / "Dockerfile.dockerignore").read_text(), re.M)
    copied = [name for line in re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", dockerfile, re.M) for name in line.split()]
    assert sorted(copied) == sorted(sent)
    assert "--require-hashes" in dockerfile and "\nUSER ray\n" in dockerfile
    assert all((REPOSITORY / name).exists() for name in copied if name != "requirements.lock")
    assert Path(CLUSTER / "README.md").exists()
