"""Stand-ins for the npm packages: the same files, with a coloured disc for each object."""

import colorsys
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from skipvar.training.objects import OBJECTS


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _disc(index: int) -> bytes:
    """A disc off the middle, on a transparent ground."""
    red, green, blue = (round(255 * x) for x in colorsys.hsv_to_rgb(index / len(OBJECTS), 1, 0.4 + 0.2 * (index % 4)))
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).ellipse((4, 16, 40 + index % 20, 52), fill=(red, green, blue, 255))
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True)
    return file.getvalue()


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both archives."""
    folder = tmp_path_factory.mktemp("packages")
    codes = {name: f"1f{index:03x}" for index, name in enumerate(OBJECTS)}
    with tarfile.open(folder / "emoji-datasource-google-0.0.0.tgz", "w:gz") as tar:
        # One name carries a variation selector that its picture's file lacks, as in the real packages.
        entries = [
            {"short_name": n, "unified": c.upper() + ("-FE0F" if n == "heart" else "")} for n, c in codes.items()
        ]
        _add(tar, "package/emoji.json", json.dumps(entries).encode())
    with tarfile.open(folder / "lobehub-fluent-emoji-3d-0.0.0.tgz", "w:gz") as tar:
        for index, code in enumerate(codes.values()):
            _add(tar, f"package/assets/{code}.webp", _disc(index))
    return folder
