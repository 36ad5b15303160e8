"""The manifests of cluster/, and validators that find misspelt fields."""

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import ray
import yaml

REPOSITORY = Path(__file__).parents[2]
CLUSTER = REPOSITORY / "cluster"
SCHEMAS = Path(__file__).parent / "schemas"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def document(name: str, kind: str) -> dict[str, Any]:
    [found] = [each for each in documents(name) if each["kind"] == kind]
    return found


def custom_schema(plural: str) -> dict[str, Any]:
    """KubeRay's schema of ray.io/v1, its objects closed."""
    definition = yaml.load((SCHEMAS / f"ray.io_{plural}.yaml").read_text(), yaml.CSafeLoader)
    [version] = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object"}  # checked below, as every kind's
    return closed(schema)


def closed(schema: Any) -> Any:
    """The schema with `additionalProperties: false` where it lists properties and does not say that it keeps others.

    Kubernetes' `x-kubernetes-int-or-string` is no JSON schema: such a value may be either.
    """
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
    return result


def pod_templates(value: Any) -> list[dict[str, Any]]:
    """All pod templates inside a manifest, however deep."""
    if isinstance(value, list):
        return [found for each in value for found in pod_templates(each)]
    if not isinstance(value, dict):
        return []
    here = [value] if "containers" in value.get("spec", {}) else []
    return here + [found for each in value.values() for found in pod_templates(each)]


def validate_core(manifest: dict[str, Any]) -> None:
    """`kubernetes-validate --strict`."""
    kubernetes_validate.validate(manifest, "1.32", strict=True)


def validate_custom(manifest: dict[str, Any]) -> None:
    """A RayJob or RayCluster against its schema, and its pods against Kubernetes' own, which is stricter on them."""
    plural = {"RayJob": "rayjobs", "RayCluster": "rayclusters"}[manifest["kind"]]
    jsonschema.Draft202012Validator(custom_schema(plural)).validate(manifest)
    for template in pod_templates(manifest["spec"]):
        metadata = {"name": "x", **template.get("metadata", {})}
        validate_core(
            {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": copy.deepcopy(template["spec"])}
        )
    validate_core({"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest["metadata"]})


def ray_schema() -> dict[str, Any]:
    """Ray's schema of the files for `ray up`, as it ships in the wheel."""
    return json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
