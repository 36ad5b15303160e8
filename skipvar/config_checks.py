"""Refuses impossible values of a configuration, each with one sentence. Types are checked before, by `load_config`."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from skipvar.errors import ConfigError

if TYPE_CHECKING:
    from skipvar.config import (
        ClusterConfig,
        EngineConfig,
        InputConfig,
        ModelSection,
        OutputConfig,
        RunConfig,
        SamplingConfig,
        StorageConfig,
    )

IMAGE_FORMATS = ("png", "webp", "jpeg")
MODEL_NAMES = ("emoji", "infinity_125m", "infinity_1b", "infinity_2b", "infinity_8b", "infinity_20b")
INFINITY_SIZES = ("0.06M", "0.25M", "0.60M", "1M")
STRATEGY_NAMES = ("base", "skip_1", "skip_2", "skip_3", "uncond_1", "uncond_2", "uncond_3")
PLACEHOLDERS = ("{date}", "{fingerprint}")


def check_values(config: "RunConfig") -> None:
    """Raise `ConfigError`, naming the key and what it accepts, for the first value that cannot be used."""
    _check_input(config.input)
    _check_output(config.output)
    _check_model(config.model)
    _check_sampling(config.sampling, config.model.name)
    _check_policy(config.policy)
    _check_engine(config.engine)
    _check_cluster(config.cluster)
    _check_storage(config.storage)
    if config.audit.fraction != 0 or config.audit.min_ssim is not None:
        key, value = (
            ("fraction", config.audit.fraction) if config.audit.fraction != 0 else ("min_ssim", config.audit.min_ssim)
        )
        _refuse(f"audit.{key}", value, "only 0 and null: audits are not available yet")
    _require(0 <= config.max_error_share <= 1, "max_error_share", config.max_error_share, "a number from 0 to 1")
    _require(config.max_attempts >= 1, "max_attempts", config.max_attempts, "a whole number of 1 or more")
    _require(
        config.max_seconds is None or (_is_finite(config.max_seconds) and config.max_seconds > 0),
        "max_seconds",
        config.max_seconds,
        "a number above 0, or null for no limit",
    )


def _check_input(section: "InputConfig") -> None:
    paths = section.path if isinstance(section.path, list) else [section.path]
    for path in paths or [""]:
        if not isinstance(path, str) or not path.strip():
            _refuse("input.path", section.path, "a file, a glob, or a list of these")
        _check_scheme("input.path", path)
    for key in ("prompt_column", "id_column"):
        _require(bool(getattr(section, key).strip()), f"input.{key}", getattr(section, key), "the name of a column")
    limit = section.limit
    _require(limit is None or limit >= 1, "input.limit", limit, "a whole number of 1 or more, or null for all rows")


def _check_output(section: "OutputConfig") -> None:
    _require(bool(section.path.strip()), "output.path", section.path, "a folder or s3://bucket/prefix")
    _check_scheme("output.path", section.path)
    for name in re.findall(r"\{[^}]*\}", section.path):
        _require(name in PLACEHOLDERS, "output.path", section.path, f"no placeholders but {' and '.join(PLACEHOLDERS)}")
    _one_of("output.image_format", section.image_format, IMAGE_FORMATS)
    for key in ("unit_rows", "max_row_group_bytes", "max_file_bytes"):
        _require(getattr(section, key) >= 1, f"output.{key}", getattr(section, key), "a whole number of 1 or more")


def _check_scheme(key: str, path: str) -> None:
    scheme, separator, rest = path.partition("://")
    if separator and scheme != "s3":
        _refuse(key, path, "a local path or s3://bucket/prefix")
    if separator and not rest.split("/")[0]:
        _refuse(key, path, "s3:// followed by a bucket's name")


def _check_model(section: "ModelSection") -> None:
    _one_of("model.name", section.name, MODEL_NAMES)
    _one_of("model.dtype", section.dtype, ("auto", "float32", "bfloat16"))
    _one_of("model.device", section.device, ("auto", "cpu", "cuda"))
    if section.path is None:
        accepted = f"the place of its weights (only emoji's are embedded), or random:SEED; {section.name} needs one"
        _require(section.name == "emoji", "model.path", None, accepted)
    elif section.path.startswith("random:"):
        _require(
            section.path[7:].isdecimal(),
            "model.path",
            section.path,
            "random:SEED with a whole number, such as random:0",
        )
    for key in ("path", "vae_path", "text_encoder_path"):
        value = getattr(section, key)
        if value is not None:
            _require(bool(value.strip()), f"model.{key}", value, "a path, or null")
            _check_scheme(f"model.{key}", value)


def _check_sampling(section: "SamplingConfig", model_name: str) -> None:
    _require(0 <= section.seed < 2**63, "sampling.seed", section.seed, "a whole number from 0 to 2^63 - 1")
    cfg_ok = _is_number_or_list(section.cfg, lambda value: value >= 0)
    _require(cfg_ok, "sampling.cfg", section.cfg, "a number of 0 or more, or a list of these with one for each scale")
    tau_ok = _is_number_or_list(section.tau, lambda value: value > 0)
    _require(tau_ok, "sampling.tau", section.tau, "a number above 0, or a list of these with one for each scale")
    _require(section.top_k >= 0, "sampling.top_k", section.top_k, "a whole number of 0 (off) or more")
    _require(0 <= section.top_p <= 1, "sampling.top_p", section.top_p, "a number from 0 (off) to 1")
    if section.size is not None and model_name.startswith("infinity"):
        _one_of("sampling.size", section.size, INFINITY_SIZES)
    ratio_ok = _is_finite(section.aspect_ratio) and section.aspect_ratio > 0
    _require(ratio_ok, "sampling.aspect_ratio", section.aspect_ratio, "height / width as a number above 0")
    count = section.images_per_prompt
    _require(count >= 1, "sampling.images_per_prompt", count, "a whole number of 1 or more")
    layers = section.cfg_insertion_layers
    layers_ok = bool(layers) and all(layer <= 0 for layer in layers)
    _require(layers_ok, "sampling.cfg_insertion_layers", layers, "a list of 0 (the logits) and negative block numbers")


def _check_policy(policy: str | None) -> None:
    if policy is None or policy == "spread":
        return
    kinds = "null, spread, fixed:<strategy>, or a policy file that ends in .json"
    if policy.startswith("fixed:"):
        _one_of("policy", policy, [f"fixed:{name}" for name in STRATEGY_NAMES])
    elif not policy.endswith(".json"):
        _refuse("policy", policy, kinds)
    elif "://" in policy:
        _check_scheme("policy", policy)
    elif not Path(policy).is_file():
        raise ConfigError(f"policy: file {policy} does not exist; accepted: {kinds}.")


def _check_engine(section: "EngineConfig") -> None:
    for key in ("batch_size", "pool_images"):
        value = getattr(section, key)
        _require(
            value == "auto" or (_is_whole(value) and value >= 1),
            f"engine.{key}",
            value,
            "auto, or a whole number of 1 or more",
        )
    invariant = section.batch_invariant
    _require(
        invariant == "auto" or isinstance(invariant, bool), "engine.batch_invariant", invariant, "auto, true or false"
    )


def _check_cluster(section: "ClusterConfig") -> None:
    address_ok = section.address in ("auto", "local") or re.fullmatch(r"[\w.\-\[\]:]+:\d+", section.address) is not None
    _require(address_ok, "cluster.address", section.address, "auto, local, or host:port")
    low, high = section.replicas.min, section.replicas.max
    _require(low >= 1, "cluster.replicas.min", low, "a whole number of 1 or more")
    high_ok = high == "auto" or (_is_whole(high) and high >= low)
    _require(high_ok, "cluster.replicas.max", high, f"auto, or a whole number of at least cluster.replicas.min ({low})")
    _require(
        section.cpus_per_replica >= 1,
        "cluster.cpus_per_replica",
        section.cpus_per_replica,
        "a whole number of 1 or more",
    )
    gpus = section.gpus_per_replica
    gpus_ok = gpus == "auto" or (_is_finite(gpus) and (0 <= gpus <= 1 or (float(gpus).is_integer() and gpus > 0)))
    _require(gpus_ok, "cluster.gpus_per_replica", gpus, "auto, a share from 0 to 1, or a whole number")


def _check_storage(section: "StorageConfig") -> None:
    if section.endpoint_url is not None:
        parts = urlsplit(section.endpoint_url)
        url_ok = parts.scheme in ("http", "https") and bool(parts.hostname)
        _require(url_ok, "storage.endpoint_url", section.endpoint_url, "http://host:port, https://host, or null")
        if parts.username or parts.password:  # never echoed: it would land in logs
            raise ConfigError(
                "storage.endpoint_url: holds a user or password; give credentials by the AWS environment instead."
            )
    retry_ok = _is_finite(section.retry_seconds) and section.retry_seconds >= 0
    _require(retry_ok, "storage.retry_seconds", section.retry_seconds, "a number of 0 or more")
    stale_ok = _is_finite(section.lease_stale_seconds) and section.lease_stale_seconds > 0
    _require(stale_ok, "storage.lease_stale_seconds", section.lease_stale_seconds, "a number above 0")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_number_or_list(value: Any, is_accepted: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(_is_finite(item) and is_accepted(item) for item in values)


def _one_of(key: str, value: str, accepted: Sequence[str]) -> None:
    _require(value in accepted, key, value, f"one of {', '.join(accepted)}")


def _require(is_accepted: bool, key: str, value: Any, accepted: str) -> None:
    if not is_accepted:
        _refuse(key, value, accepted)


def _refuse(key: str, value: Any, accepted: str) -> NoReturn:
    shown = "null" if value is None else str(value).replace("\n", " ")
    raise ConfigError(f"{key}: {shown[:100]} is not usable; accepted: {accepted}.")
