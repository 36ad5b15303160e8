"""Pixels to file bytes, the same bytes for the same pixels."""

import io

import numpy as np
from PIL import Image as PillowImage

JPEG_QUALITY = 95
_OPTIONS: dict[str, dict[str, object]] = {
    "png": {"format": "PNG", "compress_level": 6},
    "webp": {"format": "WEBP", "lossless": True, "quality": 50, "method": 4, "exact": True},
    "jpeg": {"format": "JPEG", "quality": JPEG_QUALITY, "subsampling": 0},
}


def encode_image(pixels: np.ndarray, image_format: str) -> bytes:
    """The file of `(height, width, 3)` uint8 RGB pixels as png (lossless), webp (lossless) or jpeg (quality 95)."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"an image is (height, width, 3) uint8, not {pixels.shape} {pixels.dtype}")
    file = io.BytesIO()
    PillowImage.fromarray(np.ascontiguousarray(pixels)).save(file, **_OPTIONS[image_format])  # type: ignore[arg-type]
    return file.getvalue()


def decode_image(data: bytes) -> np.ndarray:
    """`(height, width, 3)` uint8 RGB pixels of an image file; OSError or ValueError if it is none."""
    with PillowImage.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))
