"""Audited images: made as decided, then once more under `base` from the same prefix, in the slot they still hold."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from skipvar.engine.state import Snapshot
from skipvar.types import Image, Request


@dataclass(frozen=True)
class AuditRule:
    """Which images are audited, and how they are compared with `base`."""

    is_audited: Callable[[Request], bool]
    similarity: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """Two `(B, H, W, 3)` uint8 -> `(B,)`."""


@dataclass
class Audited:
    """An image whose audit is under way."""

    at_decision: Snapshot
    image: Image | None = None
    """As it was decided; None: not made yet."""
