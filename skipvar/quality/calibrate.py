"""From the trials of a run to policy files for its model."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from skipvar.config import RunConfig
from skipvar.engine.resolved import Resolved, strategy_costs
from skipvar.errors import InputError
from skipvar.model.schedules import find_schedule
from skipvar.quality.trials import TrialTable
from skipvar.skip.calibration import TrialScores, choose_grid, fit_policy, rank_correlations
from skipvar.skip.certify import certify, policy_content, split_by_prompt

FLOORS = (0.84, 0.86, 0.88)
"""The SSIM to `base` that each policy aims at."""
PROMISES = ((0.84, 0.1), (0.88, 0.1))
"""SSIM floor and share alpha of each certified policy."""
DELTA = 0.05
"""The chance that a certificate may be wrong."""
MIN_TRIALS = 5
"""Of fewer, a fit tells nothing."""


def check_number(num_requests: int) -> None:
    """Refuses an input of too few prompts, before any trial is made."""
    if num_requests < MIN_TRIALS:
        raise InputError(f"input: {num_requests} images; at least {MIN_TRIALS} are needed to fit a policy.")


def calibrate(
    config: RunConfig, resolved: Resolved, table: TrialTable, policies: Path, show: Callable[[str], None]
) -> dict[str, Any]:
    """Fit a policy for each floor and each promise that the trials prove, and write it into the folder `policies`.

    A column `group` of the input names the kinds of prompts that misses are reported by. Returns the number of trials,
    the probe's grid with the log-loss and the seconds of each, and its rank correlations with SSIM.
    """
    trials = table.scores
    check_number(len(trials))
    fitted_for = {
        "model": resolved.model.name,
        "num_scales": resolved.num_scales,
        "decision_scale": resolved.policy.decision_scale,
        "aspect_ratio": config.sampling.aspect_ratio,
        "weights_sha256": {name: resolved.weights_sha256[name] for name in ("transformer", "vae")},
    }
    grid_scale, losses = choose_grid(trials, FLOORS)
    policies.mkdir(parents=True, exist_ok=True)
    for floor in FLOORS:
        name = f"{resolved.model.name}_{floor}"
        policy = fit_policy(trials, floor, grid_scale, name=name, fitted_for=fitted_for)
        policy["fit"] |= {"prompts": str(config.input.path), "grid_log_loss": losses}
        (policies / f"{name}.json").write_text(json.dumps(policy, indent=1) + "\n")
        show(f"{policies / name}.json: {json.dumps(policy['fit'])}")
    _write_certified(config, resolved, trials, fitted_for, policies, show)
    seconds = {grid: round(value, 5) for grid, value in table.probe_seconds.items()}
    chosen = {"grid_scale": grid_scale, "grid_log_loss": losses, "probe_seconds": seconds}
    return {"trials": len(trials), **chosen, **rank_correlations(trials, grid_scale)}


def _write_certified(
    config: RunConfig,
    resolved: Resolved,
    trials: Sequence[TrialScores],
    fitted_for: Mapping[str, Any],
    policies: Path,
    show: Callable[[str], None],
) -> None:
    """A certified policy for each promise that these trials prove, and a sentence for each that they do not."""
    sampling = config.sampling
    schedule = find_schedule(resolved.model.schedules, sampling.aspect_ratio, resolved.size)
    tested_with = {
        **fitted_for,
        "cfg": _per_scale(sampling.cfg, resolved.num_scales),
        "tau": _per_scale(sampling.tau, resolved.num_scales),
        "dtype": resolved.dtype,
        "grids": [list(grid) for grid in schedule.grids],
        "prompts": str(config.input.path),
    }
    costs = strategy_costs(resolved, sampling.aspect_ratio)
    for floor, alpha in PROMISES:
        path = policies / f"{resolved.model.name}_certified_{floor}.json"
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
