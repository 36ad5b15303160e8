"""The typed configuration of a run: sections, what each key means and accepts, and the checks beside it.

`skipvar.config_file` reads one from a YAML file and `key=value` overrides. Every section refuses impossible values when
it is made, with one sentence (`ConfigError`); what a name stands for (a preset, a strategy) is checked by whoever has
the table. Units are in the names.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from skipvar.checks import (
    INT32_MAX,
    INT64_MAX,
    check_http,
    check_scheme,
    check_seconds,
    check_whole,
    is_finite,
    is_text,
    is_whole,
    is_within,
    require,
)

Auto = Literal["auto"]
NumberOrList = int | float | list[int | float]

FLOAT32_RANGE = (1e-30, 1e30)
"""Guidance and temperature are recorded, and computed with, as float32."""
MAX_BATCH_IMAGES, MAX_POOL_IMAGES = 4096, 65_536
"""More than any device holds: a slip of the finger, told before memory is reserved for it."""
PLACEHOLDERS = ("{date}", "{fingerprint}")


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    path: str | list[str] = "conf/prompts/emoji.txt"
    """Prompts: a file, a glob, a list of these; local or `s3://`; txt (a prompt a line), jsonl, csv or parquet."""
    prompt_column: str = "prompt"
    """Column with the prompts (txt: the line)."""
    id_column: str = "id"
    """Column with the user's own labels, where the input has it."""
    limit: int | None = None
    """Use only so many first rows of the input; null: all."""

    def __post_init__(self) -> None:
        paths = self.path if isinstance(self.path, list) else [self.path]
        for path in paths or [""]:
            require(is_text(path), "input.path", self.path, "a file, a glob, or a list of these")
            check_scheme("input.path", path)
        for key in ("prompt_column", "id_column"):
            require(is_text(getattr(self, key)), f"input.{key}", getattr(self, key), "the name of a column")
        if self.limit is not None:
            check_whole("input.limit", self.limit, 1, INT64_MAX, or_else="null for all rows")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    path: str = "outputs/emoji"
    """A folder or `s3://bucket/prefix`; may hold `{date}` (UTC, YYYY-MM-DD) and `{fingerprint}`, so that a changed
    model or configuration never meets an old run."""
    image_format: Literal["png", "webp", "jpeg"] = "png"
    """png (lossless), webp (lossless) or jpeg (quality 95)."""
    unit_rows: int = 256
    """Dataset rows in a unit: the grain of scheduling, commit and resume. Capped so that raw pixels stay under 500 MB
    (`max_file_bytes`)."""
    max_row_group_bytes: int = 100_000_000
    """Encoded images in a row group of a data file."""
    max_file_bytes: int = 500_000_000
    """Raw pixels of a unit, whatever the encoder makes of them."""

    def __post_init__(self) -> None:
        require(is_text(self.path), "output.path", self.path, "a folder or s3://bucket/prefix")
        check_scheme("output.path", self.path)
        for name in re.findall(r"\{[^}]*\}", self.path):
            accepted = f"no placeholders but {' and '.join(PLACEHOLDERS)}"
            require(name in PLACEHOLDERS, "output.path", self.path, accepted)
        check_whole("output.unit_rows", self.unit_rows, 1, INT32_MAX)
        for key in ("max_row_group_bytes", "max_file_bytes"):
            check_whole(f"output.{key}", getattr(self, key), 1, INT64_MAX)


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    name: str = "emoji"
    """A preset (`skipvar.model.presets`): emoji (embedded), infinity_125m, infinity_1b, infinity_2b, ..."""
    path: str | None = None
    """The weights: a converted folder (jobs/convert_checkpoint.py), an official `.pth`, a sharded Hugging Face folder
    or safetensors; local or `s3://`. null: the embedded ones. `random:SEED`: seeded random weights, for tests."""
    vae_path: str | None = None
    """The VAE's official file, where `path` is not a converted folder."""
    text_encoder_path: str | None = None
    """A T5 encoder in Hugging Face layout (flan-t5-xl for Infinity), where `path` is not a converted folder."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPUs, and on processors that multiply it natively, else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        for key in ("path", "vae_path", "text_encoder_path"):
            if (value := getattr(self, key)) is not None:
                require(is_text(value), f"model.{key}", value, "a path, or null")
                check_scheme(f"model.{key}", value)
        if self.path is not None and self.path.startswith("random:"):
            seed = self.path.removeprefix("random:")
            is_seed = re.fullmatch(r"[0-9]{1,19}", seed) is not None and int(seed) <= INT64_MAX
            require(is_seed, "model.path", self.path, "random:SEED with a whole number below 2^63, such as random:0")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    seed: int = 0
    """The run seed: rows without a seed of their own get one derived from it and their id."""
    cfg: NumberOrList = 3.0
    """Guidance strength: a number, or a list with one for each scale."""
    tau: NumberOrList = 0.5
    """Sampling temperature: a number, or a list with one for each scale."""
    top_k: int = 900
    """1: the likelier bit always; every other value leaves both bits in the draw. 0: off."""
    top_p: float = 0.97
    """The share of probability that is drawn from. 0: off."""
    size: str | None = None
    """One of the model's sizes (0.06M, 0.25M, 0.60M, 1M for Infinity); null: the model's default."""
    aspect_ratio: float = 1.0
    """Height / width; mapped to the nearest of the model's ratios."""
    images_per_prompt: int = 1
    """Images of each row, each with its own seed."""
    negative_prompt: str | None = None
    """What the unconditional branch reads; null: nothing."""
    cfg_insertion_layers: list[int] = field(default_factory=lambda: [0])
    """Where guidance is applied: 0 on the logits, -j after block depth-j."""

    def __post_init__(self) -> None:
        low, high = FLOAT32_RANGE
        check_whole("sampling.seed", self.seed, 0, INT64_MAX, accepted="a whole number from 0 to 2^63 - 1")
        self._check_numbers("cfg", lambda value: value == 0 or low <= value <= high, "of 0 or more")
        self._check_numbers("tau", lambda value: low <= value <= high, "above 0")
        check_whole("sampling.top_k", self.top_k, 0, INT32_MAX)
        require(is_within(self.top_p, 0, 1), "sampling.top_p", self.top_p, "a number from 0 (off) to 1")
        ratio_ok = is_within(self.aspect_ratio, low, high)
        require(ratio_ok, "sampling.aspect_ratio", self.aspect_ratio, "height / width as a number above 0")
        check_whole("sampling.images_per_prompt", self.images_per_prompt, 1, INT32_MAX)
        layers = self.cfg_insertion_layers
        accepted = "a list of 0 (the logits) and negative block numbers"
        layers_ok = bool(layers) and all(is_whole(layer) and -INT32_MAX <= layer <= 0 for layer in layers)
        require(layers_ok, "sampling.cfg_insertion_layers", layers, accepted)

    def _check_numbers(self, key: str, is_accepted: Callable[[float], bool], range_text: str) -> None:
        given = getattr(self, key)
        values = given if isinstance(given, list) else [given]
        is_ok = bool(values) and all(is_finite(value) and is_accepted(value) for value in values)
        accepted = f"a number {range_text} (up to 1e30), or a list of these with one for each scale"
        require(is_ok, f"sampling.{key}", given, accepted)

    def of_each_scale(self, key: Literal["cfg", "tau"], num_scales: int) -> tuple[float, ...]:
        """The setting for each of the model's K scales. `ConfigError` for a list of another length."""
        given: NumberOrList = getattr(self, key)
        if not isinstance(given, list):
            return (float(given),) * num_scales
        accepted = f"a number, or a list of {num_scales}, one for each scale"
        require(len(given) == num_scales, f"sampling.{key}", given, accepted)
        return tuple(float(number) for number in given)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    batch_size: int | Auto = "auto"
    """Images in a batch, at most; auto: from the model's tokens. Lowered where device memory does not do."""
    pool_images: int | Auto = "auto"
    """Images that may wait in buckets with their keys and values; auto: enough for full batches."""
    batch_invariant: bool | Auto = "auto"
    """Same bits in any batch: pad products' rows and run on one thread (CPU). auto: true on CPUs, false on GPUs."""
    max_age: int = 256
    """A batch runs part full once its first image has seen so many batches go by: rare aspect ratios do not wait."""
    fixed_shapes: bool = False
    """Pad every batch of a kind to one size (GPU): neighbours no longer matter; batch sizes enter the fingerprint."""

    def __post_init__(self) -> None:
        for key, most in (("batch_size", MAX_BATCH_IMAGES), ("pool_images", MAX_POOL_IMAGES)):
            if (value := getattr(self, key)) != "auto":
                check_whole(f"engine.{key}", value, 1, most, or_else="auto")
        check_whole("engine.max_age", self.max_age, 1, INT32_MAX)


@dataclass(frozen=True, kw_only=True)
class ReplicasConfig:
    min: int = 1
    """The run begins when so many are up."""
    max: int | Auto = "auto"
    """auto: as many as the cluster has devices for."""

    def __post_init__(self) -> None:
        check_whole("cluster.replicas.min", self.min, 1, INT32_MAX)
        if self.max != "auto":
            accepted = f"auto, or a whole number of at least cluster.replicas.min ({self.min})"
            check_whole("cluster.replicas.max", self.max, self.min, INT32_MAX, accepted=accepted)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    address: str = "auto"
    """auto: the cluster that this process belongs to, else a local one; `local`: always a local one; or `host:port`."""
    replicas: ReplicasConfig = field(default_factory=ReplicasConfig)
    cpus_per_replica: int = 1
    """Also the threads that encode a replica's images."""
    gpus_per_replica: int | float | Auto = "auto"
    """auto: 1 where the device is cuda, else 0. Below 1: several replicas share a GPU."""
    replica_timeout_seconds: float = 900.0
    """A replica at work that shows neither a step nor a publication for so long is killed, and its units made again.
    More than `storage.retry_seconds`, or an endpoint that is gone for a while costs replicas."""
    grace_seconds: float = 30.0
    """How long replicas may take to publish what is complete when a run is stopped; then they are ended."""

    def __post_init__(self) -> None:
        address_ok = self.address in ("auto", "local") or re.fullmatch(r"[\w.\-\[\]:]+:\d+", self.address) is not None
        require(address_ok, "cluster.address", self.address, "auto, local, or host:port")
        check_whole("cluster.cpus_per_replica", self.cpus_per_replica, 1, INT32_MAX)
        timeout = self.replica_timeout_seconds
        require(timeout > 0, "cluster.replica_timeout_seconds", timeout, "a number of seconds above 0")
        check_seconds("cluster.grace_seconds", self.grace_seconds, can_be_zero=True)
        gpus = self.gpus_per_replica
        gpus_ok = gpus == "auto" or is_within(gpus, 0, 1) or (is_within(gpus, 1, INT32_MAX) and gpus == int(gpus))
        require(gpus_ok, "cluster.gpus_per_replica", gpus, "auto, a share from 0 to 1, or a whole number")


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    fraction: float = 0.0
    """Share of images that are re-made under `base` from the same prefix, to measure SSIM (needs `skipvar[calibrate]`).
    They are drawn by a hash of the request; the policy must decide image by image."""
    min_ssim: float | None = None
    """The floor that audited images are counted against; null: the certified policy's own, else none."""
    alpha: float | None = None
    """The promise that audits watch over: at most this share of images falls below the floor. null: the certified
    policy's own; where that has none either, there is no alarm."""
    delta: float | None = None
    """How likely a promise that holds may ever raise an alarm; null: the certified policy's own, else 0.05."""
    state: str | None = None
    """What audits have counted, and the alarm: a folder or `s3://bucket/prefix` of its own, which several runs (nights)
    share so that they add up. null: `_audit/` of the output, so that a run counts alone."""
    on_alarm: Literal["warn", "base", "stop"] = "warn"
    """warn: say so. base: make the units handed out after the alarm under `base`. stop: end in order (exit 4). An alarm
    stands for all later runs with this state, until a person gives another one."""

    def __post_init__(self) -> None:
        require(is_within(self.fraction, 0, 1), "audit.fraction", self.fraction, "a number from 0 to 1")
        floor_ok = self.min_ssim is None or is_within(self.min_ssim, -1, 1)
        require(floor_ok, "audit.min_ssim", self.min_ssim, "null, or a number from -1 to 1")
        for key in ("alpha", "delta"):
            share = getattr(self, key)
            share_ok = share is None or (is_within(share, 0, 1) and 0 < share < 1)
            require(share_ok, f"audit.{key}", share, "null, or a number between 0 and 1")
        if self.state is not None:
            require(is_text(self.state), "audit.state", self.state, "null, a folder or s3://bucket/prefix")
            check_scheme("audit.state", self.state)


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    usd_per_replica_hour: float | None = None
    """What a replica costs an hour, its share of the head included: the run then tells its cost. null: unknown."""
    max_usd: float | None = None
    """Stop in order (exit 4) when the run, all its sessions together, has cost so much. null: no limit."""

    def __post_init__(self) -> None:
        for key in ("usd_per_replica_hour", "max_usd"):
            if (value := getattr(self, key)) is not None:
                require(is_within(value, 0, 1e9) and value > 0, f"budget.{key}", value, "a number above 0, or null")
        needs_price = self.max_usd is not None and self.usd_per_replica_hour is None
        require(not needs_price, "budget.max_usd", self.max_usd, "null, unless budget.usd_per_replica_hour is given")


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    endpoint_url: str | None = None
    """S3 endpoint; null: the AWS environment's (`AWS_ENDPOINT_URL`), else AWS."""
    region: str | None = None
    """S3 region; null: the AWS environment's."""
    retry_seconds: float = 300.0
    """How long an endpoint that is gone is retried before the run stops (exit 4)."""
    lease_stale_seconds: float = 60.0
    """A run on the same output whose heartbeat has not changed for so long counts as dead."""

    def __post_init__(self) -> None:
        if self.endpoint_url is not None:
            check_http("storage.endpoint_url", self.endpoint_url, ", or null")
        check_seconds("storage.retry_seconds", self.retry_seconds, can_be_zero=True)
        check_seconds("storage.lease_stale_seconds", self.lease_stale_seconds)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    input: InputConfig = field(default_factory=InputConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    model: ModelSection = field(default_factory=ModelSection)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    policy: str | None = None
    """A policy file, `fixed:<strategy>`, `spread` (a strategy by hash of the id), or `trials` (every image under every
    strategy, compared with `base`: jobs/calibrate.py); null: `fixed:base`, every image in full."""
    policy_force: bool = False
    """Use a policy that was fitted for another model, number of scales or decision scale."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    retry_errors: bool = False
    """Make only the requests that the finished run's error table holds."""
    max_error_share: float = 0.2
    """End the run (exit 4) when more than this share of requests failed, counted after the first 100."""
    max_attempts: int = 3
    """How often a unit is handed out again after its replica died, before it is split to find the prompt at fault."""
    max_seconds: float | None = None
    """Stop in order after so long (exit 4): a night has an end. null: no limit."""

    def __post_init__(self) -> None:
        require(is_within(self.max_error_share, 0, 1), "max_error_share", self.max_error_share, "a number from 0 to 1")
        check_whole("max_attempts", self.max_attempts, 1, INT32_MAX)
        if self.max_seconds is not None:
            check_seconds("max_seconds", self.max_seconds, or_else=", or null for no limit")
