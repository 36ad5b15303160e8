"""Small pictures of audited images beside what `base` makes of them: for the report, and for nothing else.

`_pairs/unit-N.parquet` holds the few of a unit that are least like `base`, published before its data file. The dataset
itself stays as it is: `base` images are thrown away.
"""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as Picture

from skipvar.shards.storage import Storage
from skipvar.shards.unitfile import DATA, read_table
from skipvar.types import Image

PAIRS = "_pairs/"
MAX_PAIRS = 4
"""Of a unit."""
SIDE = 192
"""Pixels of a small picture's longer side."""
_CONTRAST = 4
"""Times the difference is amplified, so that it can be seen."""


@dataclass(frozen=True, kw_only=True)
class AuditPair:
    """An audited image, its `base` twin and their difference, small."""

    position: int
    image_index: int
    prompt: str
    strategy: str
    ssim: float
    image: bytes
    """WebP, as the other two."""
    base: bytes
    difference: bytes
    """Bright where the two differ, amplified four times."""


def make_pair(image: Image) -> AuditPair:
    """Of an image that was audited and has its twin's pixels."""
    assert image.base_pixels is not None and image.audit_ssim is not None
    apart = np.abs(image.pixels.astype(np.int16) - image.base_pixels).max(axis=2) * _CONTRAST
    return AuditPair(
        position=image.request.position,
        image_index=image.request.image_index,
        prompt=image.request.prompt,
        strategy=image.strategy,
        ssim=image.audit_ssim,
        image=small(Picture.fromarray(image.pixels)),
        base=small(Picture.fromarray(image.base_pixels)),
        difference=small(Picture.fromarray(np.minimum(apart, 255).astype(np.uint8))),
    )


def small(picture: Picture.Image) -> bytes:
    """A WebP file of at most `SIDE` pixels a side."""
    picture = picture.convert("RGB")
    picture.thumbnail((SIDE, SIDE), Picture.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, format="WEBP", quality=85)
    return file.getvalue()


def worst(pairs: Sequence[AuditPair], count: int) -> list[AuditPair]:
    """Those least like `base`, the worst first."""
    return sorted(pairs, key=lambda pair: (pair.ssim, pair.position, pair.image_index))[:count]


def pairs_file(pairs: Sequence[AuditPair]) -> bytes:
    """A Parquet file of the worst few."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(pair) for pair in worst(pairs, MAX_PAIRS)]), sink)
    return sink.getvalue()


def pairs_name(data_name: str) -> str:
    """Where the pairs of a data file lie."""
    return PAIRS + data_name.removeprefix(DATA)


def read_pairs(storage: Storage, name: str) -> list[AuditPair]:
    """The pairs of a file. Raises `StorageError`; `NotFoundError` where a unit has none."""
    return [AuditPair(**row) for row in read_table(storage.read(name)).to_pylist()]
