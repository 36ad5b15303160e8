"""From the trials of a run to policy files for its model."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from skipvar.config import RunConfig
from skipvar.engine.resolved import Resolved, strategy_costs
from skipvar.errors import InputError
from skipvar.shards.record import InputIdentity
from skipvar.skip.calibration import choose_grid, fit_policy, rank_correlations
from skipvar.skip.certify import SHARES, allowed_misses, certify, policy_content, split_by_prompt
from skipvar.skip.features import LatentProbe
from skipvar.skip.fitting import fit_forecasts, foretold_ranks, log_loss, rules_of
from skipvar.skip.policy import Promise
from skipvar.skip.strategy import STRATEGY_NAMES
from skipvar.types import Trial

FLOORS = (0.84, 0.86, 0.88)
"""The SSIM to `base` that each policy aims at."""
PROMISES = (Promise(0.84, alpha=0.1, delta=0.05), Promise(0.88, alpha=0.1, delta=0.05))
"""Of each certified policy."""
MIN_TRIALS = 5
"""Of fewer, a fit tells nothing."""


def check_input(identity: InputIdentity, show: Callable[[str], None]) -> None:
    """Refuses an input of too few prompts, and tells what its number of prompts buys, before any trial is made."""
    _check_number(identity.num_requests)
    show(what_trials_buy(identity.num_rows, min(PROMISES, key=lambda promise: promise.alpha)))


def _check_number(num_images: int) -> None:
    if num_images < MIN_TRIALS:
        raise InputError(f"input: {num_images} images; at least {MIN_TRIALS} are needed to fit a policy.")


def what_trials_buy(num_prompts: int, promise: Promise) -> str:
    """A sentence on how many misses so many prompts forgive, and what more of them would."""
    sentences = []
    for count in (num_prompts, 2 * num_prompts):
        tested = round(SHARES[2] * count)
        allowed = allowed_misses(tested, promise.alpha, promise.delta)
        sentences.append(
            f"{count} prompts put {tested} in the test part, where at most {allowed} misses ({allowed / tested:.1%}) "
            f"certify a share of {promise.alpha:g}"
            if allowed >= 0
            else f"{count} prompts put {tested} in the test part, too few to certify a share of {promise.alpha:g}"
        )
    return "; ".join(sentences) + f" (confidence {1 - promise.delta:g})."


def calibrate(
    config: RunConfig, resolved: Resolved, trials: Sequence[Trial], policies: Path, show: Callable[[str], None]
) -> dict[str, Any]:
    """Fit a policy for each floor and each promise that the trials prove, and write it into the folder `policies`.

    A column `group` of the input names the kinds of prompts that misses are reported by. Returns, JSON-able, the number
    of trials, the grid of the paper's probe with its rank correlations with SSIM, and how every probe foretells.
    """
    _check_number(len(trials))
    fitted_for = {
        "model": resolved.model.name,
        "num_scales": resolved.num_scales,
        "decision_scale": resolved.policy.decision_scale,
        "aspect_ratio": config.sampling.aspect_ratio,
        "weights_sha256": dict(resolved.weights_sha256),
    }
    grid_scale, losses = choose_grid(trials, FLOORS)
    policies.mkdir(parents=True, exist_ok=True)
    for floor in FLOORS:
        name = f"{resolved.model.name}_{floor}"
        policy = fit_policy(trials, floor, grid_scale, name=name, fitted_for=fitted_for)
        policy["fit"] |= {"prompts": str(config.input.path), "grid_log_loss": losses}
        (policies / f"{name}.json").write_text(_text(policy))
        show(f"{policies / name}.json: {json.dumps(policy['fit'])}")
    _write_certified(config, resolved, trials, fitted_for, policies, show)
    chosen = {"grid_scale": grid_scale, "grid_log_loss": losses}
    foretold = compare_probes(trials, PROMISES[0].floor)
    return {"trials": len(trials), **chosen, **rank_correlations(trials, grid_scale), "probes": foretold}


def compare_probes(trials: Sequence[Trial], floor: float) -> dict[str, Any]:
    """How well each probe foretells on held-out prompts, and what it costs; the latents a scale earlier as well.

    By its name: the log-loss at the floor over all strategies, the rank correlation of the SSIM of `skip_3` with what
    was foretold, and the seconds an image.
    """
    earlier = [replace(trial, latents=trial.early_latents) for trial in trials]
    tried = [(str(rule), rule, trials) for rule in rules_of(trials)]
    tried += [(f"{name}, a scale earlier", rule, earlier) for name, rule, _ in tried if isinstance(rule, LatentProbe)]
    strategies = [name for name in STRATEGY_NAMES if name != "base"]
    found = {}
    for name, rule, seen in tried:
        fit = fit_forecasts(seen, strategies, rule)
        found[name] = {
            "log_loss": round(log_loss(fit, seen, floor), 4),
            "spearman_skip_3": foretold_ranks(fit, seen)["skip_3"],
            "seconds": round(float(np.mean([rule.seconds(trial) for trial in seen])), 6),
        }
    return found


def _text(policy: Mapping[str, Any]) -> str:
    """A policy file's text: a list of numbers takes one line."""
    text = json.dumps(policy, indent=1)
    return re.sub(r"\[[-+.\deE,\s]+\]", lambda found: " ".join(found[0].split()), text) + "\n"


def _write_certified(
    config: RunConfig,
    resolved: Resolved,
    trials: Sequence[Trial],
    fitted_for: Mapping[str, Any],
    policies: Path,
    show: Callable[[str], None],
) -> None:
    """A certified policy for each promise that these trials prove, and a sentence for each that they do not."""
    sampling = config.sampling
    tested_with = {**fitted_for, **asdict(resolved.conditions), "prompts": str(config.input.path)}
    costs = strategy_costs(resolved, sampling.aspect_ratio)
    parts = split_by_prompt(trials, sampling.seed)
    for promise in PROMISES:
        path = policies / f"{resolved.model.name}_certified_{promise.floor}.json"
        found = certify(parts, promise, costs)
        if found is None:
            unproven = f"a floor of {promise.floor} and a share of {promise.alpha}"
            show(f"{path}: not written: {len(parts.test)} prompts in the test part prove nothing for {unproven}")
            continue
        path.write_text(_text(policy_content(parts, found, costs, name=path.stem, fitted_for=tested_with)))
        show(f"{path}: {found.text}; token-forwards {found.tested.cost_share:.1%}")
