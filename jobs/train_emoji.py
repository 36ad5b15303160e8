"""Makes the embedded model: fetch the data, train the autoencoder, encode, train the transformer, export, evaluate.

Each command is one stage and goes on from what the run's folder holds; `all` does everything from nothing. `restore`
puts an exported model into a fresh run folder, to train on from there: restore, data, encode, transformer, export.
`decoder` trains the decoder alone: the encoder's bits, which the transformer has learned, stay.
"""

import argparse
import json
import logging
import subprocess
from dataclasses import replace
from pathlib import Path

import torch

from skipvar.model.pipeline import EMBEDDED_FOLDER, load_folder, to_uint8
from skipvar.skip.probe import take_probe
from skipvar.training.common import Folders, save_sheet
from skipvar.training.data import NAME_PACKAGE, PICTURE_PACKAGE, Pictures, split_combinations
from skipvar.training.evaluate import Judge, generate_all, make_prompts, measure_fidelity, measure_skipping
from skipvar.training.export import export, load_exported_autoencoder, restore
from skipvar.training.latents import encode_latents
from skipvar.training.recipe import Recipe, TransformerRecipe, VaeRecipe
from skipvar.training.transformer import train_transformer
from skipvar.training.vae import measure_psnr, train_vae

SHEET_IMAGES = 24


def fetch_data(folders: Folders) -> None:
    """Puts the two npm packages into the packages folder, unless they are there."""
    folders.packages.mkdir(parents=True, exist_ok=True)
    if len(list(folders.packages.glob("*.tgz"))) < 2:
        subprocess.run(["npm", "pack", PICTURE_PACKAGE, NAME_PACKAGE], cwd=folders.packages, check=True)


def evaluate(recipe: Recipe, folders: Folders, model: Path) -> None:
    """Prints every number that the model is judged by; the last line is one JSON document."""
    pictures = Pictures(folders.packages, recipe.image_side)
    _, held_out = split_combinations(recipe)
    autoencoder = load_exported_autoencoder(model)
    scores: dict[str, object] = {
        f"psnr_{name}": round(measure_psnr(autoencoder, pictures, held_out, layout, recipe.evaluation.num_prompts), 3)
        for layout, name in enumerate(("single", "four", "grid"))
    }
    print(scores, flush=True)
    pipeline = load_folder(model, torch.float32, torch.device("cpu"))
    prompts = make_prompts(held_out, recipe.evaluation.num_prompts)
    generated = generate_all(pipeline, prompts, recipe.evaluation, take_probe)
    judge = Judge(pictures)
    for name, images in zip(("base", "skip_1", "skip_2", "skip_3"), generated.images, strict=True):
        # The pixels that a user gets, not the decoder's floats.
        pixels = to_uint8(images).permute(0, 3, 1, 2) / 127.5 - 1
        fidelity = {key: round(share, 4) for key, share in measure_fidelity(pixels, prompts, judge).items()}
        print(name, fidelity, flush=True)
        if name == "base":
            scores |= fidelity
    scores |= measure_skipping(generated, prompts, recipe.evaluation)
    save_sheet(model / "samples.png", generated.images[0][:SHEET_IMAGES], columns=8)
    print(json.dumps({"num_prompts": len(prompts), **scores}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ["data", "vae", "decoder", "encode", "transformer", "export", "restore", "evaluate", "all"]
    parser.add_argument("command", choices=commands)
    parser.add_argument("--run", type=Path, default=Path("training_runs/emoji"), help="checkpoints, latents, logs")
    parser.add_argument("--packages", type=Path, default=Path("training_runs/packages"), help="the npm archives")
    parser.add_argument("--model", type=Path, default=EMBEDDED_FOLDER, help="the exported folder")
    parser.add_argument("--minutes", type=float, help="length of this stretch of training (else the recipe's)")
    parser.add_argument("--decay-minutes", type=float, help="its last minutes: rate down to zero (else the recipe's)")
    parser.add_argument("--eager", action="store_true", help="do not compile the transformer")
    parser.add_argument("--processes", type=int, default=2, help="of one core each, for the transformer")
    parser.add_argument("--prompts", type=int, help="evaluate so many prompts only")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    folders = Folders(packages=args.packages, run=args.run)
    folders.run.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(seed=args.seed)
    if args.prompts:
        recipe = replace(recipe, evaluation=replace(recipe.evaluation, num_prompts=args.prompts))
    stages = {
        "data": lambda: fetch_data(folders),
        "vae": lambda: train_vae(recipe, folders, *_stretch(args, recipe.vae)),
        "encode": lambda: encode_latents(recipe, folders),
        "transformer": lambda: train_transformer(
            recipe, folders, *_stretch(args, recipe.transformer), not args.eager, args.processes
        ),
        "export": lambda: export(recipe, folders, args.model),
        "evaluate": lambda: evaluate(recipe, folders, args.model),
    }
    others = {
        "decoder": lambda: train_vae(recipe, folders, *_stretch(args, recipe.vae), decoder_only=True),
        "restore": lambda: restore(folders, args.model),
    }
    for name in stages if args.command == "all" else [args.command]:
        (stages | others)[name]()


def _stretch(args: argparse.Namespace, recipe: VaeRecipe | TransformerRecipe) -> tuple[float, float]:
    """Minutes and decay minutes: those of the command line, else the recipe's."""
    minutes = recipe.minutes if args.minutes is None else args.minutes
    return minutes, recipe.decay_minutes if args.decay_minutes is None else args.decay_minutes


if __name__ == "__main__":
    main()
