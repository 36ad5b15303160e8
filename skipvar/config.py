"""The typed configuration of a run: one complete YAML file plus `key=value` overrides.

Every key is documented here, under its field. Unknown keys, wrong types and impossible values are refused with one
sentence (`ConfigError`). Units are in the names.
"""

import difflib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from skipvar.config_checks import check_values
from skipvar.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    path: Any = "conf/prompts/emoji.txt"
    """Prompts: a file, a glob, a list of these; local or `s3://`; txt (a prompt a line), jsonl, csv or parquet."""
    prompt_column: str = "prompt"
    id_column: str = "id"
    """Column with the user's own labels, where the input has it."""
    limit: int | None = None
    """Use only so many first rows of the input."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    path: str = "outputs/emoji"
    """A folder or `s3://bucket/prefix`; may hold `{date}` (UTC, YYYY-MM-DD) and `{fingerprint}`."""
    image_format: str = "png"
    """png (lossless), webp (lossless) or jpeg (quality 95)."""
    unit_rows: int = 256
    """Dataset rows in a unit: the grain of scheduling, commit and resume. Capped so that raw pixels stay under 500 MB
    (`max_file_bytes`)."""
    max_row_group_bytes: int = 100_000_000
    max_file_bytes: int = 500_000_000


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    name: str = "emoji"
    """A preset: emoji (embedded), infinity_125m, infinity_1b, infinity_2b, infinity_8b, infinity_20b."""
    path: str | None = None
    """The weights: a converted folder (jobs/convert_checkpoint.py), an official `.pth`, a sharded Hugging Face folder
    or safetensors; local or `s3://`. null: the embedded ones. `random:SEED`: seeded random weights, for tests."""
    vae_path: str | None = None
    """The VAE's official file, where `path` is not a converted folder."""
    text_encoder_path: str | None = None
    """A T5 encoder in Hugging Face layout (flan-t5-xl for Infinity), where `path` is not a converted folder."""
    dtype: str = "auto"
    """float32, bfloat16, or auto: bfloat16 on GPUs, on CPUs what a short measurement finds faster."""
    device: str = "auto"
    """cpu, cuda, or auto."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    seed: int = 0
    """The run seed: rows without a seed of their own get one derived from it and their id."""
    cfg: Any = 3.0
    """Guidance strength: a number, or a list with one for each scale."""
    tau: Any = 0.5
    """Sampling temperature: a number, or a list with one for each scale."""
    top_k: int = 900
    top_p: float = 0.97
    size: str | None = None
    """One of the model's sizes (0.06M, 0.25M, 0.60M, 1M for Infinity); null: the model's default."""
    aspect_ratio: float = 1.0
    """Height / width; mapped to the nearest of the model's ratios."""
    images_per_prompt: int = 1
    negative_prompt: str | None = None
    cfg_insertion_layers: list[int] = field(default_factory=lambda: [0])
    """Where guidance is applied: 0 on the logits, -j after block depth-j."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    batch_size: Any = "auto"
    """Images in a batch, at most; auto: from free memory."""
    pool_images: Any = "auto"
    """Images that may wait in buckets with their keys and values; auto: from free memory."""
    batch_invariant: Any = "auto"
    """Same bits in any batch: pad products' rows and run on one thread (CPU). auto: true on CPUs, false on GPUs."""
    fixed_shapes: bool = False
    """Pad every batch of a kind to one size (GPU): neighbours no longer matter; batch sizes enter the fingerprint."""


@dataclass(frozen=True, kw_only=True)
class ReplicasConfig:
    min: int = 1
    max: Any = "auto"
    """auto: as many as the cluster has devices for."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    address: str = "auto"
    """auto: the cluster that this process belongs to, else a local one; `local`: always a local one; or `host:port`."""
    replicas: ReplicasConfig = field(default_factory=ReplicasConfig)
    cpus_per_replica: int = 1
    gpus_per_replica: Any = "auto"
    """auto: 1 where the device is cuda, else 0."""


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    fraction: float = 0.0
    """Share of images that are re-made under `base` from the same prefix, to measure SSIM. Not available yet: 0."""
    min_ssim: float | None = None


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    endpoint_url: str | None = None
    """S3 endpoint; null: the AWS environment's (`AWS_ENDPOINT_URL`), else AWS."""
    region: str | None = None
    retry_seconds: float = 300.0
    """How long an endpoint that is gone is retried before the run stops (exit 4)."""
    lease_stale_seconds: float = 60.0
    """A run on the same output whose heartbeat has not changed for so long counts as dead."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. Read with `load_config`."""

    input: InputConfig = field(default_factory=InputConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    model: ModelSection = field(default_factory=ModelSection)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    policy: str | None = None
    """A policy file, `fixed:<strategy>`, or `spread`; null: the model's own (`fixed:base` where it has none)."""
    policy_force: bool = False
    """Use a policy that was fitted for another model, number of scales or decision scale."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    retry_errors: bool = False
    """Make only the requests that the finished run's error table holds."""
    max_error_share: float = 0.2
    """End the run (exit 4) when more than this share of requests failed, counted after the first 100."""
    max_attempts: int = 3
    """How often a unit is handed out again after its replica died, before it is split to find the prompt at fault."""
    max_seconds: float | None = None
    """Stop in order after so long (exit 4): a night has an end."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked, frozen configuration in the YAML file `path`, with `key=value` overrides applied in order.

    Raises `ConfigError` with one sentence that names the file or the key, what is wrong, and what is accepted.
    """
    config = OmegaConf.structured(RunConfig)
    for origin, tree in [(str(path), _read_yaml(Path(path))), *((text, _parse_override(text)) for text in overrides)]:
        _check_keys(tree, RunConfig, origin)
        config = _merge(config, tree)
    try:
        loaded = cast(RunConfig, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or path}: {_first_line(error)}.") from error
    check_values(loaded)
    return loaded


def to_yaml(config: RunConfig) -> str:
    """All keys and values, as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """All keys and values as plain JSON-able values."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def _read_yaml(path: Path) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise ConfigError(
            f"Configuration file {path} does not exist; give a YAML file such as conf/emoji.yaml."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Configuration file {path} cannot be read: {_first_line(error)}.") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line} is not valid YAML: {error.problem}.") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is not valid YAML: {_first_line(error)}.") from error


def _parse_override(text: str) -> dict[str, Any]:
    """`a.b=value` as `{"a": {"b": value}}`; the value is read as YAML, or is the bare text where that is no YAML."""
    key, equals, value_text = text.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"Override {text!r} is not understood; write key=value, for example input.limit=10.")
    try:
        value = OmegaConf.to_container(OmegaConf.create(f"value: {value_text}"))["value"]  # type: ignore[index, call-overload]
    except (yaml.YAMLError, OmegaConfBaseException, TypeError):
        value = value_text
    tree: Any = value
    for part in reversed(key.strip().split(".")):
        tree = {part: tree}
    return cast(dict[str, Any], tree)


def _check_keys(tree: Any, section: type, origin: str, prefix: str = "") -> None:
    """Refuse keys that `section` lacks, and anything but a mapping where a section stands."""
    if not isinstance(tree, dict):
        where = (
            f"{prefix.rstrip('.')}: expected a section with keys" if prefix else f"{origin} must hold keys and values"
        )
        raise ConfigError(f"{where} ({', '.join(item.name for item in fields(section))}), found {_shown(tree)}.")
    hints = get_type_hints(section)
    for key, value in tree.items():
        if key not in hints:
            raise ConfigError(f"{origin}: unknown key {prefix}{key}; {_suggest(f'{prefix}{key}')}")
        if is_dataclass(hints[key]):
            _check_keys(value, cast(type, hints[key]), origin, f"{prefix}{key}.")


def _suggest(key: str) -> str:
    known = list(_all_keys(RunConfig))
    by_name = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    nearest = by_name or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]}?" if nearest else "--print-config shows all keys."


def _all_keys(section: type, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(section).items():
        if is_dataclass(hint):
            yield from _all_keys(cast(type, hint), f"{prefix}{name}.")
        yield f"{prefix}{name}"


def _merge(config: Any, tree: dict[str, Any]) -> Any:
    try:
        return OmegaConf.merge(config, tree)
    except OmegaConfBaseException as error:
        key = (error.full_key or "").split("[")[0]
        value = OmegaConf.select(OmegaConf.create(tree), key) if key else tree
        raise ConfigError(f"{key}: expected {_accepted(key)}, found {_shown(value)}.") from error


def _accepted(key: str) -> str:
    """What the field `key` takes, in words."""
    hint: Any = RunConfig
    for part in key.split("."):
        hint = get_type_hints(hint).get(part, Any)
    return _in_words(hint)


def _in_words(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_in_words(part) for part in get_args(hint))
    if get_origin(hint) is list:
        return f"a list of which each is {_in_words(get_args(hint)[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return words.get(hint, "another value")


def _shown(value: Any) -> str:
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
