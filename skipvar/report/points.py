"""What the strategies of a sample of images were chosen from: the probe's two numbers, or the chances foretold."""

import math
from dataclasses import dataclass

import pyarrow as pa

_PROBE = ("probe_sobel_change", "probe_fft_high_frequency_ratio")
_CHANCES = ("skip_1", "skip_3")
POINT_COLUMNS = [*_PROBE, *(f"strategy_scores.{name}" for name in _CHANCES)]
"""What `read_points` needs of a data file, besides `strategy`."""


@dataclass(frozen=True)
class Point:
    """What one image's strategy was chosen from."""

    x: float
    """Sobel change; where no probe was decoded, the chance of `skip_1` to keep the floor."""
    y: float
    """FFT high-frequency ratio; else the chance of `skip_3`."""
    strategy: str
    is_chance: bool


def read_points(table: pa.Table) -> list[Point]:
    """Of the images whose strategy was chosen by numbers."""
    columns = ["strategy_scores", *_PROBE, "strategy"]
    found = []
    for scores, *probe, strategy in zip(*(table[name].to_pylist() for name in columns), strict=True):
        is_chance = probe[0] is None
        x, y = [(scores or {}).get(name) for name in _CHANCES] if is_chance else probe
        if x is not None and y is not None and math.isfinite(x + y):
            found.append(Point(x, y, strategy, is_chance))
    return found
