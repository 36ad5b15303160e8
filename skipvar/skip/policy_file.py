"""Policy files: reading one, and refusing what was fitted for something else. JSON, never a pickle."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from skipvar.checks import check_one_of, check_scheme, require, shown
from skipvar.errors import ConfigError
from skipvar.skip.chances import finite, table_from_json
from skipvar.skip.features import FREQUENCIES, LATENT_MEANS, LATENT_SIDES, DecodedProbe, LatentProbe, ProbeRule
from skipvar.skip.policy import (
    TRIALS,
    CertifiedPolicy,
    Conditions,
    LogisticPolicy,
    LogisticStage,
    Policy,
    Promise,
    SpreadPolicy,
)
from skipvar.skip.strategy import NUM_DECIDED_SCALES, STRATEGY_NAMES, default_decision_scale, make_strategy


def check_spec(spec: str | None) -> None:
    """Raise `ConfigError` for what `load_policy` would refuse whatever the model is: it costs nothing to ask first."""
    if spec in (None, "spread", TRIALS):
        return
    kinds = "null, spread, trials, fixed:<strategy>, or a policy file that ends in .json"
    if spec.startswith("fixed:"):
        check_one_of("policy", spec, [f"fixed:{name}" for name in STRATEGY_NAMES])
        return
    require(spec.endswith(".json"), "policy", spec, kinds)
    if "://" in spec:
        check_scheme("policy", spec)
        return
    try:
        is_file = Path(spec).is_file()
    except OSError:  # a name too long for any file
        is_file = False
    if not is_file:
        raise ConfigError(f"policy: file {shown(spec)} does not exist; accepted: {kinds}.")


@dataclass(frozen=True)
class ModelFacts:
    """What a policy file is checked against."""

    name: str
    num_scales: int
    weights_sha256: Mapping[str, str]
    conditions: Conditions | None = None
    """Asked by certified policies alone; None matches no promise."""


def load_policy(
    spec: str | None,
    facts: ModelFacts,
    *,
    force: bool = False,
    read: Callable[[str], bytes] = lambda path: Path(path).read_bytes(),
) -> Policy:
    """`fixed:<strategy>`, `spread`, `trials`, a policy file (which `read` reads), or None for `fixed:base`.

    Raises `ConfigError` for an unknown policy, a broken file, or one fitted for another model, number of scales or
    decision scale, unless `force`.
    """
    decision_scale = default_decision_scale(facts.num_scales)
    spec = spec or "fixed:base"
    if spec.startswith("fixed:"):
        strategy = spec.removeprefix("fixed:")
        try:
            make_strategy(strategy, facts.num_scales)
        except ValueError as error:
            raise ConfigError(f"policy {spec}: {error}") from error
        return Policy(
            name=spec,
            content_hash=spec,
            decision_scale=decision_scale,
            strategies=(strategy,),
            known_strategy=strategy,
        )
    if spec in ("spread", TRIALS):
        if decision_scale is None:
            fewest = NUM_DECIDED_SCALES + 2
            raise ConfigError(f"policy {spec} needs at least {fewest} scales, this size has {facts.num_scales}")
        kind = SpreadPolicy if spec == "spread" else Policy
        return kind(name=spec, content_hash=spec, decision_scale=decision_scale)
    return _load_file(spec, facts, read, force=force)


def _load_file(path: str, facts: ModelFacts, read: Callable[[str], bytes], *, force: bool) -> Policy:
    try:
        raw = read(path)
    except OSError as error:
        accepted = "a policy file, fixed:<strategy> or spread"
        raise ConfigError(f"policy {path}: cannot be read ({error.strerror}); accepted: {accepted}") from error
    try:
        content = json.loads(raw)
        fitted_for = content["fitted_for"]
        if absent := {"model", "num_scales", "decision_scale"} - fitted_for.keys():
            raise ValueError(f"fitted_for lacks {', '.join(sorted(absent))}")
        decision_scale = min(int(fitted_for["decision_scale"]), facts.num_scales - NUM_DECIDED_SCALES - 1)
        policy = _policy_of(content, hashlib.sha256(raw).hexdigest(), decision_scale)
        if not force:
            _check_fits(path, fitted_for, facts)
            if isinstance(policy, CertifiedPolicy):
                _check_promise(path, policy.tested_with, facts.conditions)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"policy {path}: not a policy file ({type(error).__name__}: {error})") from error
    grid_scale = policy.probe.grid_scale if isinstance(policy.probe, DecodedProbe) else 0
    if policy.decision_scale is None or policy.decision_scale < 1 or not 0 <= grid_scale < facts.num_scales:
        raise ConfigError(f"policy {path}: needs a decision scale and a probe grid that {facts.num_scales} scales lack")
    return policy


def _policy_of(content: Mapping[str, Any], content_hash: str, decision_scale: int) -> LogisticPolicy | CertifiedPolicy:
    """The policy of a file's content; raises `ValueError`, `KeyError` or `TypeError` where it is not one."""
    name, probe, fitted_for = str(content["name"]), probe_from_json(content["probe"]), content["fitted_for"]
    common: dict[str, Any] = {"name": name, "content_hash": content_hash, "decision_scale": decision_scale}
    common["probe"] = probe
    if name in ("spread", TRIALS) or name.startswith("fixed:"):
        raise ValueError(f"its name is {name!r}, which is another policy's")
    if content["kind"] == "logistic":
        if not isinstance(probe, DecodedProbe):
            raise ValueError(f"probe.features of a logistic policy must be {', '.join(FREQUENCIES)}")
        skip, uncond = (stage_from_json(content["stages"][kind]) for kind in ("skip", "uncond"))
        return LogisticPolicy(**common, skip=skip, uncond=uncond)
    if content["kind"] != "certified":
        raise ValueError(f"kind is {content['kind']!r}, accepted: 'logistic', 'certified'")
    needed = {"weights_sha256", "aspect_ratio", *(one.name for one in fields(Conditions))}
    if absent := needed - {key for key in fitted_for if key != "weights_sha256" or fitted_for[key]}:
        raise ValueError(f"a certified policy's fitted_for lacks {', '.join(sorted(absent))}")
    table = table_from_json(content["chances"])
    for strategy in table.forecasts:
        make_strategy(strategy, int(fitted_for["num_scales"]))
    floor, alpha, delta = (float(content["certificate"][key]) for key in ("ssim_floor", "alpha", "delta"))
    if not (0 < alpha < 1 and 0 < delta < 1):
        raise ValueError("certificate: alpha and delta must be between 0 and 1")
    return CertifiedPolicy(
        **common,
        strategies=("base", *table.forecasts),
        table=table,
        tested_with=_conditions_of(fitted_for),
        aspect_ratio=float(fitted_for["aspect_ratio"]),
        promise=Promise(floor, alpha, delta),
    )


def _conditions_of(content: Mapping[str, Any]) -> Conditions:
    """What a certified policy was tested with; raises `ValueError`, `KeyError` or `TypeError` where it is not told."""
    negative_prompt = content["negative_prompt"]
    return Conditions(
        cfg=finite(content["cfg"]),
        tau=finite(content["tau"]),
        top_k=int(content["top_k"]),
        top_p=float(content["top_p"]),
        negative_prompt=None if negative_prompt is None else str(negative_prompt),
        cfg_insertion_layers=tuple(int(layer) for layer in content["cfg_insertion_layers"]),
        dtype=content["dtype"],
        grids=tuple((int(height), int(width)) for height, width in content["grids"]),
    )


def probe_to_json(rule: ProbeRule) -> dict[str, Any]:
    """What a policy file says of its probe."""
    if isinstance(rule, LatentProbe):
        return {"features": [LATENT_MEANS], "side": rule.side}
    return {"features": list(FREQUENCIES), "grid_scale": rule.grid_scale}


def probe_from_json(content: Mapping[str, Any]) -> ProbeRule:
    """The inverse; raises `ValueError`, `KeyError` or `TypeError` where it is none."""
    if content["features"] == list(FREQUENCIES):
        return DecodedProbe(int(content["grid_scale"]))
    if content["features"] != [LATENT_MEANS] or content["side"] not in LATENT_SIDES:
        sides = ", ".join(map(str, LATENT_SIDES))
        raise ValueError(f"probe.features must be {', '.join(FREQUENCIES)}, or {LATENT_MEANS} with a side of {sides}")
    return LatentProbe(content["side"])


def stage_from_json(content: Mapping[str, Any]) -> LogisticStage:
    """A stage out of a policy file; raises `ValueError` or `KeyError` where it is not one."""
    stage = LogisticStage(
        classes=tuple(int(label) for label in content["classes"]),
        coef=tuple(finite(row) for row in content["coef"]),
        intercept=finite(content["intercept"]),
        mean=finite(content["mean"]),
        scale=finite(content["scale"]),
    )
    if min(stage.scale) <= 0:
        raise ValueError("a stage's scale must be positive")
    stage.probabilities([0.0] * len(stage.mean))  # raises ValueError where the shapes disagree
    if len(stage.mean) != 2 or not set(stage.classes) <= set(range(NUM_DECIDED_SCALES + 1)):
        raise ValueError(f"a stage takes two features and gives classes out of 0 to {NUM_DECIDED_SCALES}")
    return stage


def _check_fits(path: str, fitted_for: Mapping[str, Any], facts: ModelFacts) -> None:
    """Refuses a policy that was fitted for something else; `weights_sha256` is only set for models that need it."""
    decision_scale = default_decision_scale(facts.num_scales)
    checks = [
        ("model", fitted_for["model"], facts.name),
        ("number of scales", fitted_for["num_scales"], facts.num_scales),
    ]
    weights = fitted_for.get("weights_sha256") or {}
    if not isinstance(weights, Mapping) or not all(isinstance(sha256, str) for sha256 in weights.values()):
        raise ValueError("weights_sha256 gives a hash by the weights' name")
    checks += [
        (f"{name} weights", sha256[:12], facts.weights_sha256.get(name, "")[:12]) for name, sha256 in weights.items()
    ]
    if fitted_for["num_scales"] == facts.num_scales:
        checks.append(("decision scale", fitted_for["decision_scale"], decision_scale))
    for what, fitted, actual in checks:
        if fitted != actual:
            raise ConfigError(
                f"policy {path} was fitted for another {what} ({fitted}, this run has {actual}): "
                "choose another policy, or insist with policy_force=true"
            )


def _check_promise(path: str, tested_with: Conditions, conditions: Conditions | None) -> None:
    """Refuses a certified policy for settings that its promise was not tested with."""
    if conditions is None:
        raise ConfigError(f"policy {path} promises nothing here: what the run's images depend on is not known")
    for name, tested, actual in tested_with.differences(conditions):
        what = "schedule" if name == "grids" else name
        raise ConfigError(
            f"policy {path} promises nothing for this {what} (tested with {_short(tested)}, this run has "
            f"{_short(actual)}): choose another policy, certify one with jobs.calibrate, or insist with "
            "policy_force=true"
        )


def _short(value: Any) -> str:
    """A list of equal numbers as that number, grids in one line."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], tuple):
        return " ".join(f"{height}x{width}" for height, width in value)
    is_even = isinstance(value, list | tuple) and len(set(value)) == 1
    return str(value[0] if is_even else value)
