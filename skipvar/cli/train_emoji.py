"""Makes the embedded model: fetch the data, train the autoencoder, encode, train the transformer, export, evaluate.

Each command is one stage and goes on from what the run's folder holds; `all` does everything from nothing, and after an
interruption what is left. `restore` puts an exported model into a fresh run folder, to train on from there: restore,
encode, transformer --steps N (above the step reached), export. `evaluate` prints one JSON document and draws the
model folder's samples.png and skipping.png.

A GPU is used where there is one (one process, bfloat16); else processes of one core each.
"""

import argparse
import contextlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from skipvar.checks import MAX_SECONDS
from skipvar.cli.running import Parser, check_folder, local_path, number, run_job, whole
from skipvar.model.identity import EMBEDDED_FOLDER
from skipvar.training.common import Folders
from skipvar.training.data import fetch_packages
from skipvar.training.evaluate import evaluate
from skipvar.training.export import export
from skipvar.training.parallel import LOG_FORMAT
from skipvar.training.recipe import Recipe
from skipvar.training.start import PARTS, restore
from skipvar.training.transformer import train_transformer
from skipvar.training.vae import encode_latents, train_vae

ALL = ("data", "vae", "encode", "transformer", "export", "evaluate")
TRAINING = ("vae", "transformer")
NEED_PICTURES = ("vae", "encode", "evaluate")


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.train_emoji") -> int:
    """Parse the arguments, run the stage or all of them, and return the exit code."""
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=[*ALL, "restore", "all"])
    parser.add_argument(
        "--run", type=local_path, default=Path("training_runs/emoji"), help="checkpoints, latents, logs"
    )
    parser.add_argument("--packages", type=local_path, default=Path("training_runs/packages"), help="the npm archives")
    parser.add_argument("--model", type=local_path, default=EMBEDDED_FOLDER, help="the exported folder")
    parser.add_argument("--only", choices=PARTS, help="restore this network only")
    parser.add_argument("--steps", type=whole(1), help="train up to this step (else the recipe's last)")
    parser.add_argument("--decay-steps", type=whole(1), help="the last of them: rate down to zero (else the recipe's)")
    parser.add_argument(
        "--minutes", type=number(0, MAX_SECONDS), default=math.inf, help="stop after this long, to go on another time"
    )
    parser.add_argument("--eager", action="store_true", help="do not compile the transformer")
    parser.add_argument("--processes", type=int, choices=(1, 2, 4), default=2, help="of one core each, without a GPU")
    parser.add_argument("--prompts", type=whole(1), help="evaluate so many prompts only")
    arguments = parser.parse_args(argv)
    if arguments.command not in TRAINING and (arguments.steps or arguments.decay_steps or arguments.minutes < math.inf):
        parser.error(f"--steps, --decay-steps and --minutes belong to {', '.join(TRAINING)}")
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    return run_job(lambda: _train(arguments))


def _train(arguments: argparse.Namespace) -> int:
    folders = Folders(packages=arguments.packages, run=arguments.run)
    names = ALL if arguments.command == "all" else (arguments.command,)
    check_folder("--run", folders.run)
    if {"data", *NEED_PICTURES} & set(names):
        check_folder("--packages", folders.packages)
    folders.run.mkdir(parents=True, exist_ok=True)
    recipe, model, processes = _recipe(arguments), arguments.model, arguments.processes
    stages: dict[str, Callable[[], object]] = {
        "data": lambda: fetch_packages(folders.packages),
        "vae": lambda: train_vae(recipe, folders, arguments.minutes, processes),
        "encode": lambda: encode_latents(recipe, folders),
        "transformer": lambda: train_transformer(recipe, folders, arguments.minutes, processes, not arguments.eager),
        "export": lambda: export(recipe, folders, model),
        "restore": lambda: restore(recipe, folders, model, (arguments.only,) if arguments.only else PARTS),
        "evaluate": lambda: print(json.dumps(evaluate(recipe, folders, model))),
    }
    try:
        for name in names:
            if name in NEED_PICTURES:
                fetch_packages(folders.packages)
            stages[name]()
    finally:
        with contextlib.suppress(OSError):  # a stage that was refused leaves no empty folder behind
            folders.run.rmdir()
    return 0


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """The repository's, with what the command line changes."""
    recipe = Recipe()
    if arguments.prompts:
        recipe = replace(recipe, evaluation=replace(recipe.evaluation, num_prompts=arguments.prompts))
    part = "transformer" if arguments.command == "transformer" else "vae"
    settings = getattr(recipe, part)
    wanted = {"num_steps": arguments.steps, "decay_steps": arguments.decay_steps}
    schedule = replace(settings.schedule, **{name: number for name, number in wanted.items() if number})
    return replace(recipe, **{part: replace(settings, schedule=schedule)})
