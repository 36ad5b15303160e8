"""Audited images: made as decided, then once more under `base` from the same prefix, in the slot they still hold."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from skipvar.types import Image, Request


@dataclass(frozen=True)
class AuditRule:
    """Which images are audited, and how they are compared with `base`."""

    is_audited: Callable[[Request], bool]
    similarity: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """Two `(B, H, W, 3)` uint8 -> `(B,)`."""


def with_base(image: Image, base: np.ndarray, seconds: float, rule: AuditRule) -> Image:
    """An image with what its twin under `base` says of it; `seconds` are those of both together.

    The twin shares text and prefix with it, and needs no probe.
    """
    shared = sum(image.phase_seconds.get(phase, 0.0) for phase in ("text", "prefix"))
    ssim = float(rule.similarity(image.pixels[None], base[None])[0])
    return replace(image, audit_ssim=ssim, base_pixels=base, base_seconds=seconds - image.engine_seconds + shared)


def as_its_own_base(image: Image) -> Image:
    """An audited image for which `base` was chosen: but for the probe it is its own twin."""
    seconds = image.engine_seconds - image.phase_seconds.get("probe", 0.0)
    return replace(image, audit_ssim=1.0, base_seconds=seconds)
