"""The contact sheet shows every picture with its prompt and strategy, whatever their size."""

import io

import numpy as np
import pytest
from PIL import Image

from skipvar.report.sheet import CELL_WIDTH, MAX_IMAGES, PICTURE_SIDE, Picture, draw_sheet
from skipvar.shards.encode import encode_image


def picture(height: int = 16, width: int = 16, prompt: str = "a cat") -> Picture:
    pixels = np.full((height, width, 3), (255, 0, 0), np.uint8)
    return Picture(encode_image(pixels, "png"), prompt, "skip_2")


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (8, 8, 1), (9, 8, 2), (MAX_IMAGES, 8, 8)])
def test_rows_of_eight(count: int, columns: int, rows: int) -> None:
    sheet = Image.open(io.BytesIO(draw_sheet([picture()] * count)))
    assert sheet.width == columns * CELL_WIDTH
    assert sheet.height % rows == 0 and sheet.height // rows > PICTURE_SIDE


@pytest.mark.parametrize("size", [(8, 64), (64, 8), (1, 1), (300, 200)])
def test_any_shape_keeps_its_proportions(size: tuple[int, int]) -> None:
    sheet = np.asarray(Image.open(io.BytesIO(draw_sheet([picture(*size)]))))
    red = (sheet[:, :, 0] > 200) & (sheet[:, :, 1] < 50)
    height, width = red.any(axis=1).sum(), red.any(axis=0).sum()
    assert max(height, width) == PICTURE_SIDE
    assert abs(height / width - size[0] / size[1]) < 0.1 * size[0] / size[1]


@pytest.mark.parametrize("prompt", ["", "x" * 500, "many words " * 100, "<b>html</b> & 雪の猫 🐈", "a\nb\tc"])
def test_any_prompt_fits(prompt: str) -> None:
    sheet = np.asarray(Image.open(io.BytesIO(draw_sheet([picture(prompt=prompt)]))))
    assert (sheet[:, -2:] == 255).all(), "text runs over the cell's edge"
