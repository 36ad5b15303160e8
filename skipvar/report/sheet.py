"""The contact sheet of a dataset: its first images, each with its prompt and strategy beneath."""

import io
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from skipvar.shards.storage import Storage
from skipvar.shards.unitfile import data_files, open_unit

SHEET = "preview.png"
MAX_IMAGES = 64
COLUMNS = 8
CELL_WIDTH = 168
PICTURE_SIDE = 160
TEXT_HEIGHT = 58
PROMPT_LINES = 3
MAX_SHOWN_CHARACTERS = 400
"""More than three lines can hold: what measuring a text costs grows with its length."""
MARGIN = 4
_BATCH_ROWS = 16
_STREAM_BYTES = 1 << 16
"""No more pages are read than are shown."""
BACKGROUND, TEXT_COLOR, STRATEGY_COLOR = (255, 255, 255), (40, 40, 44), (20, 90, 200)


@dataclass(frozen=True)
class Picture:
    """One cell of the sheet."""

    image: bytes
    """An image file's bytes."""
    prompt: str
    strategy: str


def first_pictures(storage: Storage, name: str, count: int) -> Iterator[Picture]:
    """The first pictures of a data file: its column of images is streamed, and left where they end."""
    with open_unit(storage, name, buffer_size=_STREAM_BYTES) as parquet:
        batches = parquet.iter_batches(
            batch_size=min(count, _BATCH_ROWS), columns=["image", "prompt", "strategy"], use_threads=False
        )
        rows = (row for batch in batches for row in batch.to_pylist())
        for row in itertools.islice(rows, count):
            yield Picture(row["image"]["bytes"], row["prompt"], row["strategy"])


def draw_sheet(pictures: list[Picture]) -> bytes:
    """A PNG file of all pictures in rows of eight."""
    columns = min(COLUMNS, max(1, len(pictures)))
    rows = max(1, math.ceil(len(pictures) / columns))
    cell_height = PICTURE_SIDE + TEXT_HEIGHT + 2 * MARGIN
    sheet = Image.new("RGB", (columns * CELL_WIDTH, rows * cell_height), BACKGROUND)
    for index, picture in enumerate(pictures):
        corner = (index % columns * CELL_WIDTH + MARGIN, index // columns * cell_height + MARGIN)
        _draw_picture(sheet, picture, corner)
    file = io.BytesIO()
    sheet.save(file, format="PNG")
    return file.getvalue()


def write_sheet(storage: Storage) -> None:
    """Put the contact sheet beside the dataset; where that has no image, nothing is written."""
    names = [name for (_, retry), name in data_files(storage) if not retry]  # a retry lies beside its unit
    found = (picture for name in names for picture in first_pictures(storage, name, MAX_IMAGES))
    pictures = list(itertools.islice(found, MAX_IMAGES))
    if pictures:
        storage.replace(SHEET, draw_sheet(pictures))


def _draw_picture(sheet: Image.Image, picture: Picture, corner: tuple[int, int]) -> None:
    left, top = corner
    with Image.open(io.BytesIO(picture.image)) as opened:
        image = opened.convert("RGB")
    scale = PICTURE_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    shown = image.resize(size, Image.Resampling.LANCZOS)
    sheet.paste(shown, (left + (PICTURE_SIDE - size[0]) // 2, top + (PICTURE_SIDE - size[1]) // 2))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    lines = _wrap(picture.prompt, font, PICTURE_SIDE)
    for number, line in enumerate(lines):
        draw.text((left, top + PICTURE_SIDE + 3 + 13 * number), line, TEXT_COLOR, font)
    draw.text((left, top + PICTURE_SIDE + 3 + 13 * len(lines)), picture.strategy, STRATEGY_COLOR, font)


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in at most three lines of so many pixels; what does not fit ends in an ellipsis."""
    lines: list[str] = [""]
    for word in text[:MAX_SHOWN_CHARACTERS].split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > PROMPT_LINES:
        lines = [*lines[: PROMPT_LINES - 1], lines[PROMPT_LINES - 1] + " ..."]
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."
