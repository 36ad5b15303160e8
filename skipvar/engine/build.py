"""From what a run resolved to, to an engine: the model is loaded, memory is planned, the processor is checked."""

import logging
import platform
from dataclasses import asdict, replace

import torch

from skipvar.config import RunConfig
from skipvar.engine.audit import AuditRule
from skipvar.engine.batcher import Limits
from skipvar.engine.engine import Engine
from skipvar.engine.memory import plan_memory
from skipvar.engine.resolved import DeviceReport, Resolved, known_schedule, resolve
from skipvar.engine.runner import Runner
from skipvar.engine.sampler import Sampler, SamplingRules
from skipvar.engine.self_check import SelfCheck, make_batch_invariant
from skipvar.engine.trials import TrialEngine, TrialRule
from skipvar.errors import ConfigError, ModelError
from skipvar.model.attention import TextPadding
from skipvar.model.pipeline import Pipeline, load_pipeline

logger = logging.getLogger(__name__)


def build_engine(
    config: RunConfig,
    resolved: Resolved | None = None,
    rule: TrialRule | AuditRule | None = None,
    pipeline: Pipeline | None = None,
) -> Engine:
    """Loads the model (all paths must be local) unless its `pipeline` is there, plans memory, checks batch invariance.

    `resolved` is what the run was opened with (None: looked up here): a model that differs from it is a `ModelError`.
    With a `TrialRule` the engine makes trials of all its requests, with an `AuditRule` it audits some of its images.
    With `batch_invariant` it sets torch to one thread for the whole process.
    """
    resolved = resolved or resolve(config)
    pipeline = pipeline or load_pipeline(replace(config.model, device=resolved.device, dtype=resolved.dtype))
    _check_same_model(pipeline, resolved)
    rules = SamplingRules(size=resolved.size, guidance_layers=resolved.conditions.cfg_insertion_layers)
    costs = resolved.costs
    plan = plan_memory(
        costs,
        device=resolved.device,
        batch_size=resolved.batch_size,
        pool_images=resolved.pool_images,
        free_bytes=torch.cuda.mem_get_info()[0] if pipeline.device.type == "cuda" else None,
        fixed_shapes=resolved.fixed_shapes,
    )
    found = _self_check(config, resolved, pipeline, plan.prefix_images) if resolved.batch_invariant else None
    runner = Runner(
        Sampler(pipeline, rules, text_padding=_text_padding(resolved)),
        plan,
        slot_tokens=costs.prefix_tokens,
    )
    makes_trials = isinstance(rule, TrialRule)
    largest = min(plan.prefix_images, *plan.suffix_images.values()) if makes_trials else plan.prefix_images
    limits = Limits(largest, plan.suffix_images, plan.pool_images, config.engine.max_age)
    report = DeviceReport(
        processor=torch.cuda.get_device_name() if pipeline.device.type == "cuda" else _cpu_name(),
        torch=str(torch.__version__),  # it is a `TorchVersion`: who unpickles one imports torch
        batch_size={"prefix": limits.prefix_images, **limits.suffix_images},
        pool_images=limits.pool_images,
        self_check=None if found is None else asdict(found),
    )
    if isinstance(rule, TrialRule):
        return TrialEngine(runner, resolved.policy, limits, report, rule)
    return Engine(runner, resolved.policy, limits, report, rule)


def _text_padding(resolved: Resolved) -> TextPadding:
    if resolved.fixed_shapes:
        return TextPadding.FULL
    return TextPadding.NONE if resolved.batch_invariant else TextPadding.LONGEST


def _check_same_model(pipeline: Pipeline, resolved: Resolved) -> None:
    """Refuses weights that are not those that the run was opened with: it would hold two kinds of images."""
    if pipeline.config != resolved.model:
        raise ModelError(
            f"model.path: the config.json of {pipeline.config.name} here is not the one the run was opened with"
        )
    for name, sha256 in resolved.weights_sha256.items():
        if pipeline.weights_sha256.get(name) != sha256:
            raise ModelError(
                f"model.path: the {name} weights here have SHA-256 {pipeline.weights_sha256.get(name)}, the run was "
                f"opened with {sha256} (config.json's, where the model is a converted folder); give all nodes the same."
            )


def _self_check(config: RunConfig, resolved: Resolved, pipeline: Pipeline, batch_size: int) -> SelfCheck:
    torch.set_num_threads(1)
    usual = known_schedule(resolved.model, config.sampling.aspect_ratio, resolved.size)
    schedule = usual or resolved.schedules[0]  # where rows must bring their own ratio, any will do
    found = make_batch_invariant(pipeline, schedule, batch_size)
    if not found.is_invariant:
        differing = f"this processor rounds differently in batches of another size (scales {found.differing_scales})"
        if config.engine.batch_invariant is True:
            raise ConfigError(f"engine.batch_invariant=true cannot be kept: {differing}; use batch_invariant=false")
        logger.warning("%s: an image may depend on its batch; engine.batch_size=1 avoids that", differing)
    return found


def _cpu_name() -> str:
    """What rounding may depend on: the machine's kind and the instructions that torch uses there."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
