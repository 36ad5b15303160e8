"""Everything that was `auto` or had to be looked up, once, before any model is loaded: `Resolved`. No torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from skipvar.config import RunConfig
from skipvar.engine.memory import Costs, batch_sizes
from skipvar.errors import ConfigError, RowError
from skipvar.model.config import ModelConfig
from skipvar.model.device import Device, Dtype, find_device, find_dtype
from skipvar.model.identity import Files, config_sha256, identify
from skipvar.model.schedules import Schedule, find_schedule
from skipvar.skip.policy import TRIALS, CertifiedPolicy, Conditions, Policy, Promise
from skipvar.skip.policy_file import ModelFacts, load_policy
from skipvar.skip.strategy import STRATEGY_NAMES, default_decision_scale, make_strategy

ELEMENT_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What a run's images depend on besides their requests, and what every replica must find the same."""

    model: ModelConfig
    weights_sha256: Mapping[str, str]
    """Of each network."""
    conditions: Conditions
    """What a promise depends on; rows may have settings of their own."""
    size: str
    policy: Policy
    device: Device
    batch_invariant: bool
    fixed_shapes: bool
    batch_size: int | None
    """Images in a batch, at most; None: from the model's tokens. A replica with too little memory lowers it."""
    pool_images: int | None
    """Images that may wait in buckets; None: enough for full batches."""
    promise: Promise | None = None
    """What audits watch over; None: nothing is audited, or nothing was promised."""

    @cached_property
    def schedules(self) -> tuple[Schedule, ...]:
        """Of all the model's aspect ratios, at the run's size."""
        ratios = self.model.schedules.grids
        return tuple(find_schedule(self.model.schedules, float(ratio), self.size) for ratio in ratios)

    @property
    def num_scales(self) -> int:
        return self.model.schedules.sizes[self.size]

    @property
    def dtype(self) -> Dtype:
        return self.conditions.dtype

    @property
    def max_image_pixels(self) -> int:
        """Pixels of the largest image."""
        return self.costs.image_pixels

    @property
    def costs(self) -> Costs:
        """What one image costs, for the plan of memory."""
        return Costs(
            model=self.model,
            schedules=self.schedules,
            element_bytes=ELEMENT_BYTES[self.dtype],
            decision_scale=None if self.policy.known_strategy else self.policy.decision_scale,
            strategy_names=self.policy.strategies,
        )

    def fingerprint_parts(self) -> dict[str, Any]:
        """Its share of the run's fingerprint, by the names that a refusal to resume shows the user."""
        engine: dict[str, Any] = {"batch_invariant": self.batch_invariant, "fixed_shapes": self.fixed_shapes}
        if self.fixed_shapes:
            sizes = batch_sizes(self.costs, device=self.device, batch_size=self.batch_size)
            engine["batch_size"] = {
                "prefix": sizes.prefix_images,
                "decode": sizes.decode_images,
                **sizes.suffix_images,
            }
        return {
            "model": {
                "name": self.model.name,
                "config_sha256": config_sha256(self.model),
                "weights_sha256": dict(self.weights_sha256),
                "dtype": self.dtype,
            },
            "policy": {"name": self.policy.name, "sha256": self.policy.content_hash},
            "engine": engine,
        }

    def to_dict(self) -> dict[str, Any]:
        """For `_run.json`: what it adds to the fingerprint's parts."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "size": self.size,
            "num_scales": self.num_scales,
            "decision_scale": self.policy.decision_scale,
            "max_image_pixels": self.max_image_pixels,
            "batch_size": self.batch_size,
            "pool_images": self.pool_images,
            "batch_invariant": self.batch_invariant,
            "promise": None if self.promise is None else asdict(self.promise),
        }


@dataclass(frozen=True, kw_only=True)
class DeviceReport:
    """What an engine found on its device when it was built. It changes no pixel that `Resolved` does not tell of."""

    processor: str
    """What rounding may depend on: the machine's kind and the instructions in use there, or the GPU's name."""
    torch: str
    batch_size: Mapping[str, int]
    """Images in a prefix batch, and in a suffix batch of each strategy."""
    pool_images: int
    self_check: Mapping[str, Any] | None
    """None: not asked for."""


def resolve(config: RunConfig, files: Files | None = None, device: Device | None = None) -> Resolved:
    """Looks up everything that a run depends on. Reads no weights but to hash those that no config.json tells of.

    `device` is what the cluster has; None: this machine's. Raises `ConfigError` and `ModelError`, one sentence for
    each mistake of the user's.
    """
    files = files or Files()
    model, weights_sha256 = identify(config.model, files)
    size, layers = check_sampling(config, model)
    num_scales = model.schedules.sizes[size]
    device = device or find_device(config.model.device)
    usual = known_schedule(model, config.sampling.aspect_ratio, size)
    conditions = Conditions(
        cfg=config.sampling.of_each_scale("cfg", num_scales),
        tau=config.sampling.of_each_scale("tau", num_scales),
        top_k=config.sampling.top_k,
        top_p=config.sampling.top_p,
        negative_prompt=config.sampling.negative_prompt or None,
        cfg_insertion_layers=layers,
        dtype=find_dtype(config.model.dtype, device),
        grids=None if usual is None else usual.grids,
    )
    facts = ModelFacts(model.name, num_scales, weights_sha256, conditions)
    policy = load_policy(config.policy, facts, force=config.policy_force, read=files.read)
    return Resolved(
        model=model,
        weights_sha256=weights_sha256,
        conditions=conditions,
        size=size,
        policy=policy,
        device=device,
        batch_invariant=_batch_invariant(config, device),
        fixed_shapes=config.engine.fixed_shapes,
        batch_size=_number(config.engine.batch_size),
        pool_images=_number(config.engine.pool_images),
        promise=_audited_promise(config, policy),
    )


DEFAULT_DELTA = 0.05


def _audited_promise(config: RunConfig, policy: Policy) -> Promise | None:
    """What the audits of a run watch over: the configuration's words, else the certified policy's."""
    audit = config.audit
    if policy.name == TRIALS and find_spec("torchmetrics") is None:
        raise ConfigError("policy trials needs torchmetrics; pip install 'skipvar[calibrate]'")
    if not audit.fraction:
        return None
    if policy.name == TRIALS:
        raise ConfigError("audit.fraction: trials compare every strategy with base already; give 0 with policy=trials")
    if policy.known_strategy is not None:
        raise ConfigError(
            f"audit.fraction {audit.fraction}: policy {policy.name} decides nothing image by image; audits need "
            "a policy file or spread, give one or audit.fraction=0"
        )
    if find_spec("torchmetrics") is None:
        raise ConfigError("audit.fraction needs torchmetrics; pip install 'skipvar[calibrate]', or give 0")
    own = policy.promise if isinstance(policy, CertifiedPolicy) else None
    own_floor, own_alpha, own_delta = (own.floor, own.alpha, own.delta) if own else (None, None, DEFAULT_DELTA)
    floor = own_floor if audit.min_ssim is None else audit.min_ssim
    alpha = audit.alpha or own_alpha
    if alpha is None:
        return None
    if floor is None:
        raise ConfigError("audit.alpha promises a share of images under a floor: give that as audit.min_ssim")
    return Promise(floor, alpha, audit.delta or own_delta)


def known_schedule(model: ModelConfig, aspect_ratio: float, size: str) -> Schedule | None:
    """The schedule of a ratio; None where the model lacks it: its rows will be error rows."""
    try:
        return find_schedule(model.schedules, aspect_ratio, size)
    except RowError:
        return None


def check_sampling(config: RunConfig, model: ModelConfig) -> tuple[str, tuple[int, ...]]:
    """The size and the layers where guidance is applied, checked against the model. Raises `ConfigError`."""
    size = config.sampling.size or model.schedules.default_size
    if size not in model.schedules.sizes:
        raise ConfigError(f"sampling.size {size!r} is not one of {model.name}'s: {', '.join(model.schedules.sizes)}")
    layers = tuple(config.sampling.cfg_insertion_layers)
    depth = model.transformer.depth
    if not layers or any(layer > 0 or depth + layer < 1 for layer in layers):
        raise ConfigError(f"sampling.cfg_insertion_layers {list(layers)}: each must be 0 or from -1 to {1 - depth}")
    return size, layers


def strategy_costs(resolved: Resolved, aspect_ratio: float) -> dict[str, int]:
    """Token-forwards of one image under each strategy. Raises `ConfigError` for a ratio that the model lacks."""
    try:
        schedule = find_schedule(resolved.model.schedules, aspect_ratio, resolved.size)
    except RowError as error:
        raise ConfigError(f"sampling.{error}.") from error
    has_decision = default_decision_scale(schedule.num_scales) is not None
    names = STRATEGY_NAMES if has_decision else STRATEGY_NAMES[:1]
    strategies = (make_strategy(name, schedule.num_scales) for name in names)
    return {strategy.name: strategy.token_forwards(schedule.num_tokens) for strategy in strategies}


def _batch_invariant(config: RunConfig, device: str) -> bool:
    wanted, is_cpu = config.engine.batch_invariant, device == "cpu"
    if wanted == "auto":
        return is_cpu
    if wanted and not is_cpu:
        raise ConfigError("engine.batch_invariant is for CPUs; on a GPU use engine.fixed_shapes=true")
    return bool(wanted)


def _number(value: Any) -> int | None:
    return None if value == "auto" else int(value)
