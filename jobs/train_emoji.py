"""Makes the embedded model: fetch the data, train the autoencoder, encode, train the transformer, export, evaluate.

Each command is one stage and goes on from what the run's folder holds; `all` does everything from nothing, and after an
interruption what is left. `restore` puts an exported model into a fresh run folder, to train on from there: restore,
encode, transformer --steps N (above the step reached), export. `evaluate` also draws the model folder's samples.png.
"""

import argparse
import logging
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from jobs.evaluate_emoji import evaluate
from skipvar.errors import InputError, SkipvarError
from skipvar.model.identity import EMBEDDED_FOLDER
from skipvar.training.common import Folders
from skipvar.training.data import NAME_PACKAGE, PICTURE_PACKAGE
from skipvar.training.export import export
from skipvar.training.latents import encode_latents
from skipvar.training.parallel import LOG_FORMAT
from skipvar.training.recipe import Recipe
from skipvar.training.start import PARTS, restore
from skipvar.training.transformer import train_transformer
from skipvar.training.vae import train_vae

ALL = ("data", "vae", "encode", "transformer", "export", "evaluate")
TRAINING = ("vae", "transformer")
NEED_PICTURES = ("vae", "encode", "evaluate")


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ["data", "vae", "encode", "transformer", "export", "restore", "evaluate", "all"]
    parser.add_argument("command", choices=commands)
    parser.add_argument("--run", type=Path, default=Path("training_runs/emoji"), help="checkpoints, latents, logs")
    parser.add_argument("--packages", type=Path, default=Path("training_runs/packages"), help="the npm archives")
    parser.add_argument("--model", type=Path, default=EMBEDDED_FOLDER, help="the exported folder")
    parser.add_argument("--only", choices=PARTS, help="restore this network only")
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
        "restore": lambda: restore(recipe, folders, args.model, (args.only,) if args.only else PARTS),
        "evaluate": lambda: evaluate(recipe, folders, args.model),
    }
    try:
        for name in ALL if args.command == "all" else [args.command]:
            if name in NEED_PICTURES:
                fetch_data(folders)
            stages[name]()
    except SkipvarError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
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
