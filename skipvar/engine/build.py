"""From a configuration to an engine: model, policy, batch sizes and the self-check, and what came of every `auto`."""

import dataclasses
import logging
import platform
from pathlib import Path
from typing import Any

import torch

from skipvar.config import RunConfig
from skipvar.engine.batcher import Limits
from skipvar.engine.engine import Engine
from skipvar.engine.memory import Costs, image_costs, plan_memory
from skipvar.engine.runner import Runner
from skipvar.engine.sampler import SamplingRules
from skipvar.engine.self_check import Verdict, make_batch_invariant
from skipvar.errors import ConfigError
from skipvar.model.config import ModelConfig
from skipvar.model.pipeline import EMBEDDED_FOLDER, Pipeline, load_pipeline, read_config
from skipvar.model.presets import PRESETS
from skipvar.model.schedules import Schedule, find_schedule
from skipvar.skip.policy import ModelFacts, load_policy
from skipvar.skip.strategy import STRATEGY_NAMES, default_decision_scale, make_strategy

logger = logging.getLogger(__name__)


def build_engine(config: RunConfig) -> Engine:
    """Loads the model and the policy, plans memory, checks batch invariance. All paths must be local.

    On CPUs with `engine.batch_invariant` (the default there) it sets torch to one thread for the whole process.
    """
    pipeline = load_pipeline(config.model)
    rules = sampling_rules(config, pipeline.config)
    schedules = all_schedules(pipeline.config, rules.size)
    facts = ModelFacts(pipeline.config.name, schedules[0].num_scales, pipeline.weights_sha256)
    policy = load_policy(config.policy, facts, force=config.policy_force)
    batch_invariant = _resolve_batch_invariant(config, pipeline)
    costs = image_costs(
        pipeline.config,
        schedules,
        pipeline.dtype.itemsize,
        decision_scale=policy.decision_scale,
        known_strategy=policy.known_strategy,
    )
    plan = plan_memory(
        costs,
        batch_size=_number(config.engine.batch_size),
        pool_images=_number(config.engine.pool_images),
        free_bytes=torch.cuda.mem_get_info()[0] if pipeline.device.type == "cuda" else None,
    )
    verdict = _self_check(config, pipeline, plan.prefix_images) if batch_invariant else None
    runner = Runner(
        pipeline,
        rules,
        plan,
        slot_tokens=costs.prefix_tokens,
        use_mask=not (batch_invariant or config.engine.fixed_shapes),
        fixed_shapes=config.engine.fixed_shapes,
    )
    limits = Limits(plan.prefix_images, plan.suffix_images, plan.pool_images)
    engine = Engine(pipeline, rules, policy, runner, limits)
    engine.facts = _describe(engine, costs, limits, batch_invariant, verdict)
    return engine


def sampling_rules(config: RunConfig, model: ModelConfig) -> SamplingRules:
    """What holds for all images of a run, checked against the model."""
    size = config.sampling.size or model.schedules.default_size
    if size not in model.schedules.sizes:
        raise ConfigError(f"sampling.size {size!r} is not one of {model.name}'s: {', '.join(model.schedules.sizes)}")
    layers = tuple(config.sampling.cfg_insertion_layers)
    depth = model.transformer.depth
    if not layers or any(layer > 0 or depth + layer < 1 for layer in layers):
        raise ConfigError(f"sampling.cfg_insertion_layers {list(layers)}: each must be 0 or from -1 to {1 - depth}")
    return SamplingRules(size=size, guidance_layers=layers)


def all_schedules(model: ModelConfig, size: str | None) -> tuple[Schedule, ...]:
    """The schedules of all the model's aspect ratios at a size."""
    return tuple(find_schedule(model.schedules, float(ratio), size) for ratio in model.schedules.grids)


def _number(value: Any) -> int | None:
    return None if value == "auto" else int(value)


def _resolve_batch_invariant(config: RunConfig, pipeline: Pipeline) -> bool:
    wanted, is_cpu = config.engine.batch_invariant, pipeline.device.type == "cpu"
    if wanted == "auto":
        return is_cpu
    if wanted and not is_cpu:
        raise ConfigError("engine.batch_invariant is for CPUs; on a GPU use engine.fixed_shapes=true")
    return bool(wanted)


def _self_check(config: RunConfig, pipeline: Pipeline, batch_size: int) -> Verdict:
    torch.set_num_threads(1)
    schedule = pipeline.schedule(config.sampling.aspect_ratio, config.sampling.size)
    verdict = make_batch_invariant(pipeline, schedule, batch_size)
    if not verdict.is_invariant:
        found = f"this processor rounds differently in batches of another size (scales {verdict.differing_scales})"
        if config.engine.batch_invariant is True:
            raise ConfigError(f"engine.batch_invariant=true cannot be kept: {found}; use batch_invariant=false")
        logger.warning("%s: an image may depend on its batch; engine.batch_size=1 avoids that", found)
    return verdict


def _describe(
    engine: Engine, costs: Costs, limits: Limits, batch_invariant: bool, verdict: Verdict | None
) -> dict[str, Any]:
    """Everything that was resolved on this device, JSON-able."""
    pipeline, policy = engine.pipeline, engine.policy
    sizes = [pipeline.image_size(schedule) for schedule in costs.schedules]
    is_cuda = pipeline.device.type == "cuda"
    return {
        "device": pipeline.device.type,
        "processor": torch.cuda.get_device_name() if is_cuda else _cpu_name(),
        "torch": torch.__version__,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "model": pipeline.config.name,
        "model_config_sha256": pipeline.config_hash,
        "weights_sha256": dict(pipeline.weights_sha256),
        "policy": policy.name,
        "policy_sha256": policy.content_hash,
        "size": engine.rules.size,
        "num_scales": costs.schedules[0].num_scales,
        "decision_scale": policy.decision_scale,
        "max_image_pixels": max(height * width for height, width in sizes),
        "batch_size": {"prefix": limits.prefix_images, **limits.suffix_images},
        "pool_images": limits.pool_images,
        "batch_invariant": batch_invariant,
        "self_check": None if verdict is None else dataclasses.asdict(verdict),
    }


def _cpu_name() -> str:
    """What rounding may depend on: the machine's kind and the instructions that torch uses there."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def estimate_cost(config: RunConfig) -> dict[str, Any]:
    """Token-forwards of one image under each strategy, from the schedule alone: no weights are read."""
    model = _known_config(config)
    rules = sampling_rules(config, model)
    schedule = find_schedule(model.schedules, config.sampling.aspect_ratio, rules.size)
    has_decision = default_decision_scale(schedule.num_scales) is not None
    strategies = [
        make_strategy(name, schedule.num_scales) for name in (STRATEGY_NAMES if has_decision else STRATEGY_NAMES[:1])
    ]
    return {
        "num_scales": schedule.num_scales,
        "token_forwards": {strategy.name: strategy.token_forwards(schedule.num_tokens) for strategy in strategies},
    }


def _known_config(config: RunConfig) -> ModelConfig:
    """The model's sizes: from a converted folder where there is one, else the preset's."""
    is_embedded = config.model.path is None and config.model.name == "emoji"
    folder = EMBEDDED_FOLDER if is_embedded else Path(config.model.path or "")
    if (folder / "config.json").is_file() and (folder / "transformer.safetensors").is_file():
        return read_config(folder / "config.json")
    return PRESETS[config.model.name]
