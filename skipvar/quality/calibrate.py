"""From a run's model and prompts to policy files, by way of a file of trials that is kept."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from skipvar.config import RunConfig
from skipvar.engine.build import sampling_rules
from skipvar.engine.resolved import resolve, strategy_costs
from skipvar.engine.sampler import SamplingRules
from skipvar.engine.trials import Trial, make_trials
from skipvar.errors import ConfigError, InputError
from skipvar.model.identity import sha256_of_json
from skipvar.model.pipeline import Pipeline, load_pipeline
from skipvar.quality.similarity import ssim
from skipvar.shards.prompts import plan_input, read_unit
from skipvar.skip.calibration import TrialScores, choose_grid, fit_policy, rank_correlations
from skipvar.skip.certify import certify, policy_content, split_by_prompt
from skipvar.skip.strategy import NUM_DECIDED_SCALES, STRATEGY_NAMES, default_decision_scale
from skipvar.types import Probe, Request

FLOORS = (0.84, 0.86, 0.88)
"""The SSIM to `base` that each policy aims at."""
PROMISES = ((0.84, 0.1), (0.88, 0.1))
"""SSIM floor and share alpha of each certified policy."""
DELTA = 0.05
"""The chance that a certificate may be wrong."""
FIRST_GRID_SCALE = 4
MIN_TRIALS = 5
"""Of fewer, a fit tells nothing."""


def calibrate(
    config: RunConfig, num_trials: int, trials_file: Path, policies: Path, show: Callable[[str], None]
) -> dict[str, Any]:
    """Make what the file lacks of the trials, fit a policy for each floor, and write it into the folder `policies`.

    A column `group` of the input names the kinds of prompts that misses are reported by. Returns the number of trials,
    the probe's grid and its rank correlations with SSIM.
    """
    if num_trials < MIN_TRIALS:
        raise ConfigError(f"--trials {num_trials}: at least {MIN_TRIALS} are needed to fit a policy.")
    for name, path, is_usable in (
        ("--trials-file", trials_file, not trials_file.is_dir()),
        ("--out", policies, policies.is_dir() or not policies.exists()),
    ):
        if not is_usable:
            raise ConfigError(f"{name} {path}: it is a {'folder' if path.is_dir() else 'file'}; give another path.")
    policies.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(config.model)
    trials = kept_trials(config, pipeline, num_trials, trials_file)
    num_scales = pipeline.schedule(config.sampling.aspect_ratio, config.sampling.size).num_scales
    fitted_for = {
        "model": pipeline.config.name,
        "num_scales": num_scales,
        "decision_scale": num_scales - NUM_DECIDED_SCALES - 1,
        "aspect_ratio": config.sampling.aspect_ratio,
        "weights_sha256": {name: pipeline.weights_sha256[name] for name in ("transformer", "vae")},
    }
    grid_scale, losses = choose_grid(trials, FLOORS)
    for floor in FLOORS:
        name = f"{pipeline.config.name}_{floor}"
        policy = fit_policy(trials, floor, grid_scale, name=name, fitted_for=fitted_for)
        policy["fit"] |= {"prompts": str(config.input.path), "grid_log_loss": losses}
        (policies / f"{name}.json").write_text(json.dumps(policy, indent=1) + "\n")
        show(f"{policies / name}.json: {json.dumps(policy['fit'])}")
    _write_certified(config, pipeline, trials, fitted_for, policies, show)
    return {"trials": len(trials), "grid_scale": grid_scale, **rank_correlations(trials, grid_scale)}


def _write_certified(
    config: RunConfig,
    pipeline: Pipeline,
    trials: Sequence[TrialScores],
    fitted_for: Mapping[str, Any],
    policies: Path,
    show: Callable[[str], None],
) -> None:
    """A certified policy for each promise that these trials prove, and a sentence for each that they do not."""
    sampling = config.sampling
    schedule = pipeline.schedule(sampling.aspect_ratio, sampling.size)
    num_scales = schedule.num_scales
    tested_with = {
        **fitted_for,
        "cfg": _per_scale(sampling.cfg, num_scales),
        "tau": _per_scale(sampling.tau, num_scales),
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "prompts": str(config.input.path),
    }
    costs = strategy_costs(resolve(config), sampling.aspect_ratio)
    for floor, alpha in PROMISES:
        path = policies / f"{pipeline.config.name}_certified_{floor}.json"
        parts = split_by_prompt(trials, sampling.seed)
        grid_scale, _ = choose_grid(parts.fit, [floor])  # not on all trials: the test part must not be looked at
        found = certify(parts, floor, alpha, DELTA, costs, grid_scale)
        if found is None:
            least = f"{len(parts.test)} prompts in the test part"
            show(f"{path}: not written: {least} prove nothing for a floor of {floor} and a share of {alpha}")
            continue
        content = policy_content(parts, found, costs, grid_scale, name=path.stem, fitted_for=tested_with)
        path.write_text(json.dumps(content, indent=1) + "\n")
        show(f"{path}: {content['promise']}; token-forwards {content['certificate']['token_forwards_share']:.1%}")


def _per_scale(value: Any, num_scales: int) -> list[float]:
    return [float(item) for item in value] if isinstance(value, list | tuple) else [float(value)] * num_scales


def kept_trials(config: RunConfig, pipeline: Pipeline, count: int, path: Path) -> list[TrialScores]:
    """The first `count` requests' trials, in their order: those that the file holds, and new ones."""
    requests = _requests(config, pipeline, count)
    rules = sampling_rules(config, pipeline.config)
    schedule = pipeline.schedule(config.sampling.aspect_ratio, rules.size)
    if default_decision_scale(schedule.num_scales) is None:
        raise InputError(f"sampling.size {rules.size}: {schedule.num_scales} scales are too few to skip any")
    batch_size = 8 if config.engine.batch_size == "auto" else config.engine.batch_size
    keys = {request.key: _made_from(request, rules, pipeline) for request in requests}
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    known = {line.get("made_from"): line for line in lines}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        grids = range(FIRST_GRID_SCALE, schedule.num_scales)
        left = [request for request in requests if keys[request.key] not in known]
        for trial in tqdm(make_trials(pipeline, rules, left, grids, batch_size), total=len(left), unit="trial"):
            key = keys[trial.request.key]
            known[key] = _record(trial) | {"made_from": key}
            file.write(json.dumps(known[key]) + "\n")
            file.flush()
    return [_scores(known[keys[request.key]]) for request in requests]


def _made_from(request: Request, rules: SamplingRules, pipeline: Pipeline) -> str:
    """A hash of all that a trial's image depends on: not the row's place nor its label."""
    asked = asdict(replace(request, position=0, image_index=0, id="", columns={}))
    return sha256_of_json(
        {"request": asked, "rules": asdict(rules), "weights": pipeline.weights_sha256, "dtype": str(pipeline.dtype)}
    )


def _requests(config: RunConfig, pipeline: Pipeline, count: int) -> list[Request]:
    schedule = pipeline.schedule(config.sampling.aspect_ratio, config.sampling.size)
    plan = plan_input(config, num_scales=schedule.num_scales)
    read = (item for unit in range(plan.num_units) for item in read_unit(plan.unit(unit), plan.spec))
    requests = list(islice((item for item in read if isinstance(item, Request)), count))
    if len(requests) < count:
        raise InputError(f"{config.input.path}: {len(requests)} usable requests, {count} trials were asked for")
    return requests


def _record(trial: Trial) -> dict[str, Any]:
    scores = {name: float(ssim(trial.pixels[name][None], trial.pixels["base"][None])[0]) for name in STRATEGY_NAMES}
    probes = {str(scale): asdict(probe) for scale, probe in trial.probes.items()}
    group = str(trial.request.columns.get("group") or "")
    return {"id": trial.request.id, "prompt": trial.request.prompt, "group": group, "ssim": scores, "probes": probes}


def read_trials(path: Path) -> list[TrialScores]:
    """All trials of a file, whatever they were made with; raises `InputError`."""
    try:
        return [_scores(json.loads(line)) for line in path.read_text().splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no file of trials ({error}); jobs.calibrate writes one.") from error


def _scores(record: dict[str, Any]) -> TrialScores:
    probes = {int(scale): Probe(**probe) for scale, probe in record["probes"].items()}
    return TrialScores(probes=probes, ssim=record["ssim"], prompt=record["prompt"], group=record.get("group", ""))
