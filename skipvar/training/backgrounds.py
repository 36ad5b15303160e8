"""What the objects stand on: eight colours, each plain or with one of four patterns in a second colour.

A pattern is the same every time, down to its phase: tokens of one scale are drawn independently of each other and could
not agree on one, so the words must say all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

COLORS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (24, 24, 28),
    "gray": (150, 152, 158),
    "red": (216, 48, 48),
    "blue": (52, 96, 220),
    "green": (46, 160, 84),
    "yellow": (252, 214, 64),
    "pink": (250, 164, 200),
}
"""Name to RGB."""

_SECOND_COLORS: dict[str, tuple[int, int, int]] = {
    "white": (120, 160, 230),
    "black": (90, 90, 100),
    "gray": (220, 222, 226),
    "red": (252, 190, 190),
    "blue": (150, 190, 255),
    "green": (190, 236, 200),
    "yellow": (240, 140, 40),
    "pink": (214, 70, 130),
}
"""RGB of the pattern on each colour."""

# Lengths in pixels of a picture of 128.
_STRIPE_PERIOD = 11.0
"""Along a row; a diagonal stripe is this over the root of eight wide."""
_DOT_PERIOD = 13.0
_DOT_RADIUS = 3.2
_CHECK_SIDE = 10.0
_CONFETTI_RADIUS = 2.2
_NUM_CONFETTI = 70
_CONFETTI_SEED = 32
"""Of where the dots lie: the same places on every colour, so that what one teaches serves the others."""
_PHASE = (0.3, 0.6)
"""Shares of a period by which patterns are moved to the left and up."""


@dataclass(frozen=True)
class Background:
    """A name in `COLORS` and one in `PATTERNS`."""

    color: str
    pattern: str


def _striped(x: Tensor, y: Tensor) -> Tensor:
    place = ((x + y) / _STRIPE_PERIOD + _PHASE[0]) % 1
    return _soft((0.25 - (place - 0.5).abs()) * _STRIPE_PERIOD / 2**0.5)


def _dotted(x: Tensor, y: Tensor) -> Tensor:
    across, down = ((z + share * _DOT_PERIOD) % _DOT_PERIOD for z, share in zip((x, y), _PHASE, strict=True))
    return _soft(_DOT_RADIUS - torch.hypot(across - _DOT_PERIOD / 2, down - _DOT_PERIOD / 2))


def _checked(x: Tensor, y: Tensor) -> Tensor:
    column, row = ((z / _CHECK_SIDE + 2 * share).floor() for z, share in zip((x, y), _PHASE, strict=True))
    return (column + row) % 2


def _confetti(x: Tensor, y: Tensor) -> Tensor:
    middles = torch.rand(_NUM_CONFETTI, 2, generator=torch.Generator().manual_seed(_CONFETTI_SEED)) * x.shape[-1]
    distances = torch.hypot(x - middles[:, :1, None], y - middles[:, 1:, None])
    return _soft(_CONFETTI_RADIUS - distances.amin(dim=0))


def _soft(depth: Tensor) -> Tensor:
    """Share of the second colour of a pixel whose middle lies `depth` pixels inside the shape."""
    return (depth + 0.5).clamp(0, 1)


_SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda x, _: torch.zeros_like(x),
    "striped": _striped,
    "dotted": _dotted,
    "checked": _checked,
    "confetti": _confetti,
}
"""Share of the second colour at the pixels' middles `x`, `y`, both float32 (side, side)."""
PATTERNS = tuple(_SHAPES)

BACKGROUNDS = tuple(Background(color, pattern) for pattern in PATTERNS for color in COLORS)
"""All of them; the plain ones come first."""

# How people say it, after "on".
_PLACES: dict[str, tuple[str, ...]] = {
    "plain": ("{color}", "a {color} background"),
    "striped": ("striped {color}", "{color} stripes", "a striped {color} background", "a {color} striped background"),
    "dotted": (
        "dotted {color}",
        "{color} dots",
        "{color} polka dots",
        "a dotted {color} background",
        "a {color} dotted background",
    ),
    "checked": (
        "checked {color}",
        "{color} checks",
        "a checked {color} background",
        "a {color} checkered background",
    ),
    "confetti": (
        "{color} confetti",
        "a {color} confetti background",
        "a {color} background with confetti",
        "a confetti {color} background",
    ),
}


def places(background: Background) -> list[str]:
    """The phrasings of a background, to follow "on"."""
    return [place.format(color=background.color) for place in _PLACES[background.pattern]]


def paint(background: Background, side: int) -> Tensor:
    """float32 `(3, side, side)`: red, green, blue from 0 to 255."""
    middles = torch.arange(side, dtype=torch.float32) + 0.5
    y, x = torch.meshgrid(middles, middles, indexing="ij")
    share = _SHAPES[background.pattern](x, y)
    first, second = (
        torch.tensor(colors[background.color], dtype=torch.float32)[:, None, None]
        for colors in (COLORS, _SECOND_COLORS)
    )
    return first + share * (second - first)
