"""Makes trials with a run's model and prompts, and fits policies for it, on this machine.

    python -m jobs.calibrate conf/calibrate.yaml --trials 600 --out conf/policies key=value ...

Trials go to `--trials-file` (JSON lines) as they are made; a second call makes only those that the file lacks
for the same model, prompts, seeds and sampling.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from skipvar.config import RunConfig, load_config
from skipvar.engine.build import sampling_rules
from skipvar.engine.sampler import SamplingRules
from skipvar.engine.trials import Trial, make_trials
from skipvar.errors import InputError, SkipvarError
from skipvar.model.checkpoint import sha256_of_json
from skipvar.model.pipeline import Pipeline, load_pipeline
from skipvar.quality.similarity import ssim
from skipvar.shards.prompts import plan_input, read_unit
from skipvar.skip.calibration import TrialScores, choose_grid, fit_policy, rank_correlations
from skipvar.skip.strategy import NUM_DECIDED_SCALES, STRATEGY_NAMES, default_decision_scale
from skipvar.types import Probe, Request

FLOORS = (0.84, 0.86, 0.88)
FIRST_GRID_SCALE = 4


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--trials", type=int, default=600, help="how many images are made under every strategy")
    parser.add_argument("--trials-file", type=Path, default=Path("outputs/trials.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("conf/policies"), help="folder for the policy files")
    args = parser.parse_intermixed_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        pipeline = load_pipeline(config.model)
        trials = _trials(config, pipeline, args.trials, args.trials_file)
    except SkipvarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
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
        (args.out / f"{name}.json").write_text(json.dumps(policy, indent=1) + "\n")
        print(f"{args.out / name}.json: {json.dumps(policy['fit'])}")
    print(json.dumps({"trials": len(trials), "grid_scale": grid_scale, **rank_correlations(trials, grid_scale)}))
    return 0


def _trials(config: RunConfig, pipeline: Pipeline, count: int, path: Path) -> list[TrialScores]:
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
    return {"id": trial.request.id, "prompt": trial.request.prompt, "ssim": scores, "probes": probes}


def _scores(record: dict[str, Any]) -> TrialScores:
    probes = {int(scale): Probe(**probe) for scale, probe in record["probes"].items()}
    return TrialScores(probes=probes, ssim=record["ssim"])


if __name__ == "__main__":
    sys.exit(main())
