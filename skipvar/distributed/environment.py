"""What must be settled before Ray is imported, and what the place of execution means for paths. No Ray in here."""

import json
import os
import secrets
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from skipvar.config import RunConfig
from skipvar.errors import ConfigError

_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray's job manager sets this for the entry point of a job started by `ray job submit`, and for nothing else."""


def cluster_address(config: RunConfig) -> str | None:
    """The cluster to join (`host:port`), or None for a local one of our own."""
    address = config.cluster.address
    if address == "auto":
        joined = os.environ.get("RAY_ADDRESS", "").strip()
        return joined if joined and joined != "local" else None
    return None if address == "local" else address


def prepare_environment(config: RunConfig) -> None:
    """Set Ray's environment; call it before Ray is imported.

    A local cluster is protected by a token that lives in this process and its children alone: Ray would either leave
    its ports open to every user of the machine or write a token file into the home folder.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # replicas bring an environment: no idle one fits
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a spinning thread costs a neighbour its core
    if cluster_address(config) is None and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def resolve_paths(config: RunConfig) -> RunConfig:
    """The configuration with local paths made absolute, so that replicas find them whatever their working folder is.

    A submitted job's relative output is refused with `ConfigError`: it would lie in a folder that vanishes, or on the
    head alone. The other paths of one that brings its folder along are left as they are: each node has it elsewhere.
    """
    submitted = os.environ.get(_SUBMITTED)
    if submitted is not None:
        why = "under `ray job submit` it would vanish with the job's working folder"
        check_output_stays(config.output.path, why)
        if config.audit.state is not None:
            check_output_stays(config.audit.state, why, "audit.state")
        if "working_dir" in (json.loads(submitted).get("runtime_env") or {}):
            return config  # Ray unpacks its folder on every node, each time elsewhere
    inputs = config.input.path
    model = config.model
    return replace(
        config,
        input=replace(
            config.input, path=[_absolute(p) for p in inputs] if isinstance(inputs, list) else _absolute(inputs)
        ),
        output=replace(config.output, path=_absolute(config.output.path)),
        audit=replace(config.audit, state=_absolute(config.audit.state)),
        model=replace(
            model,
            path=model.path if (model.path or "").startswith("random:") else _absolute(model.path),
            vae_path=_absolute(model.vae_path),
            text_encoder_path=_absolute(model.text_encoder_path),
        ),
        policy=_absolute(config.policy) if (config.policy or "").endswith(".json") else config.policy,
    )


def check_output_stays(path: str, why: str, key: str = "output.path") -> None:
    """Refuse a relative path of what a run writes with `ConfigError`."""
    if "://" not in path and not Path(path).expanduser().is_absolute():
        raise ConfigError(f"{key}: {path} is relative, and {why}; give an absolute path or s3://bucket/prefix.")


def _absolute(path: Any) -> Any:
    if not isinstance(path, str) or "://" in path:
        return path
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError as error:
        raise ConfigError(f"The path {path[:200]!r} cannot be used: its user is not known here.") from error
