"""The charts of the report as marks in a view box; the template draws them as SVG, and CSS gives them their colours."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from skipvar.report.gather import Point, Stretch

PHASES = ("text", "prefix", "probe", "suffix", "decode")
"""Of the engine's work, in their order."""
_MAX_TIME_BINS = 48
_SCORE_BINS = 24
_GAP = 0.6
_IDLE_SECONDS = 60.0
"""Where nothing was made for longer, the time axis has a cut."""


@dataclass(frozen=True)
class Mark:
    """A dot or a bar, in its chart's view box."""

    x: float
    y: float
    width: float = 0.0
    height: float = 0.0
    style: str = ""
    """The CSS class of its colour."""
    label: str = ""
    """What a pointer that rests on it is told."""


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Marks over two axes; sizes in units of the view box."""

    marks: Sequence[Mark]
    x: "Axis"
    y: "Axis"
    told: str
    """For who cannot see it."""
    cuts: Sequence[float] = ()
    """Where the x axis leaves something out."""
    line: Tick | None = None
    """A labelled vertical line."""
    legend: Sequence[tuple[str, str]] = ()
    """CSS class and name of what the colours stand for."""

    width, height = 440, 250
    left, right, top, bottom = 46, 428, 26, 206
    """Of the area within the axes."""


class Axis:
    """From values to places in the view box, with about five round ticks; a vertical one grows upwards."""

    def __init__(
        self,
        name: str,
        values: Sequence[float],
        *,
        is_vertical: bool = False,
        pad: float = 0.03,
        are_whole: bool = False,
    ) -> None:
        self.name = name
        low, high = min(values), max(values)
        if high <= low:
            low, high = low - 0.5, high + 0.5
        low, high = low - pad * (high - low), high + pad * (high - low)
        if is_vertical and pad == 0.0:
            high *= 1.04
        self._low, self._high = low, high
        self._first, self._last = (Chart.bottom, Chart.top) if is_vertical else (Chart.left, Chart.right)
        step = _round_step((high - low) / 4)
        step = max(1.0, round(step)) if are_whole else step
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        places = [step * count for count in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
        self.ticks = [Tick(self.place(value), f"{value + 0.0:,.{decimals}f}") for value in places]

    def place(self, value: float) -> float:
        return self._first + (value - self._low) / (self._high - self._low) * (self._last - self._first)


def _round_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, not far from `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.7) * power


def _bar(x: Axis, y: Axis, span: tuple[float, float], part: tuple[float, float], style: str, label: str) -> Mark:
    """From one value of `x` to another, and of `y`; a little apart from its neighbours."""
    left, right, bottom, top = x.place(span[0]), x.place(span[1]), y.place(part[0]), y.place(part[1])
    return Mark(left + _GAP / 2, top, right - left - _GAP, bottom - top, style, label)


def scatter(points: Sequence[Point], styles: Mapping[str, str]) -> Chart | None:
    """What a sample of images was decided by, coloured by strategy; None of fewer than two."""
    if len(points) < 2:
        return None
    is_chance = points[0].is_chance
    names = ("change of edges (Sobel)", "share of high frequencies (FFT)")
    if is_chance:
        names = ("chance that skip_1 keeps the floor", "chance that skip_3 keeps it")
    x = Axis(names[0], [point.x for point in points])
    y = Axis(names[1], [point.y for point in points], is_vertical=True)
    marks = [
        Mark(x.place(p.x), y.place(p.y), style=styles[p.strategy], label=f"{p.strategy}: {p.x:.3g}, {p.y:.3g}")
        for p in points
    ]
    shown = Counter(point.strategy for point in points)
    return Chart(
        marks=marks,
        x=x,
        y=y,
        told=f"Scatter of {'two chances' if is_chance else 'the two numbers of the probe'} for {len(points)} images, "
        "coloured by strategy.",
        legend=[(styles[name], name) for name in styles if shown[name]],
    )


def histogram(scores: np.ndarray, floor: float | None) -> Chart | None:
    """SSIM of the audited images; those under the floor stand out. None where there are none."""
    if not scores.size:
        return None
    low = max(-1.0, min(float(scores.min()), 0.9 if floor is None else floor) - 0.01)
    edges = np.linspace(low, 1.0, _SCORE_BINS + 1)
    bins, _ = np.histogram(np.clip(scores, low, 1.0), edges)
    x = Axis("SSIM to base (1: the same picture)", [low, 1.0], pad=0.0)
    y = Axis("audited images", [0.0, float(bins.max())], is_vertical=True, pad=0.0, are_whole=True)
    marks = [
        _bar(x, y, (left, right), (0.0, count),
             "under" if floor is not None and right <= floor + (right - left) / 2 else "accent",
             f"{count:,} images from {left:.3f} to {right:.3f}")
        for count, left, right in zip(bins.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        if count
    ]  # fmt: skip
    under = "" if floor is None else f", {int((scores < floor).sum())} of them under {floor:g}"
    return Chart(
        marks=marks,
        x=x,
        y=y,
        told=f"Histogram of the SSIM of {scores.size:,} audited images{under}, from {scores.min():.3f} to "
        f"{scores.max():.3f}.",
        line=None if floor is None else Tick(x.place(floor), f"floor {floor:g}"),
    )


@dataclass(frozen=True)
class WorkTime:
    """Stretches on one clock that stands still while nothing is made."""

    stretches: Sequence[Stretch]
    """By their start; in seconds at work."""
    cuts: Sequence[float]
    """When the clock stood still."""
    seconds: float


def work_time(stretches: Sequence[Stretch]) -> WorkTime:
    """Leaves out what a stopped run was not at work."""
    moved: list[Stretch] = []
    cuts: list[float] = []
    shift = end = min((stretch.start for stretch in stretches), default=0.0)
    for stretch in sorted(stretches, key=lambda stretch: stretch.start):
        if stretch.start - end > _IDLE_SECONDS:
            cuts.append(end - shift)
            shift += stretch.start - end
        moved.append(replace(stretch, start=stretch.start - shift, end=stretch.end - shift))
        end = max(end, stretch.end)
    return WorkTime(moved, cuts, end - shift)


def throughput(stretches: Sequence[Stretch]) -> Chart | None:
    """Images a second over the time at work; the colours share a bar out by what the devices' time went into."""
    clock = work_time(stretches)
    if clock.seconds < 2:
        return None
    num_bins = min(_MAX_TIME_BINS, max(4, int(clock.seconds / 2)))
    edges = np.linspace(0.0, clock.seconds, num_bins + 1)
    names = [name for name in PHASES if any(stretch.phase_seconds.get(name) for stretch in stretches)] or ["all"]
    images, work = np.zeros(num_bins), np.zeros((len(names), num_bins))
    for stretch in clock.stretches:
        share = _spread(stretch, edges)
        images += stretch.images * share
        work += np.outer(_work(stretch, names), share)
    rates = images / (clock.seconds / num_bins)
    parts = rates * work / np.maximum(work.sum(axis=0), 1e-12)
    tops = parts.cumsum(axis=0)
    unit, unit_seconds = _time_unit(clock.seconds)
    x = Axis(f"{unit} at work", [0.0, clock.seconds / unit_seconds], pad=0.0)
    y = Axis("images per second", [0.0, float(rates.max())], is_vertical=True, pad=0.0)
    places = (edges / unit_seconds).tolist()
    marks = [
        _bar(x, y, (places[at], places[at + 1]), (tops[row, at] - parts[row, at], tops[row, at]), f"phase-{name}",
             f"{name}: {100 * parts[row, at] / rates[at]:.0f}% of {rates[at]:.2g} images/s")
        for at in range(num_bins)
        for row, name in enumerate(names)
        if parts[row, at] > 0
    ]  # fmt: skip
    mix = [f"{name} {100 * share:.0f}%" for name, share in zip(names, work.sum(axis=1) / work.sum(), strict=True)]
    told = f"{rates.mean():.2g} images per second over {clock.seconds / unit_seconds:.3g} {unit}."
    return Chart(
        marks=marks,
        x=x,
        y=y,
        told=f"{told} Device time: {', '.join(mix)}.",
        cuts=[x.place(cut / unit_seconds) for cut in clock.cuts],
        legend=[(f"phase-{name}", said) for name, said in zip(names, mix, strict=True)],
    )


def _work(stretch: Stretch, names: Sequence[str]) -> list[float]:
    """Seconds by phase; equal shares where none were told."""
    seconds = [stretch.phase_seconds.get(name, 0.0) for name in names]
    return seconds if any(seconds) else [1.0] * len(names)


def _spread(stretch: Stretch, edges: np.ndarray) -> np.ndarray:
    """`(bins,)`: the share of a stretch that lies in each bin; they sum to one, those of a moment too."""
    length = max(stretch.end - stretch.start, (edges[1] - edges[0]) / 100)
    start = min(stretch.start, edges[-1] - length)
    return np.diff(np.clip((edges - start) / length, 0.0, 1.0))


def _time_unit(seconds: float) -> tuple[str, float]:
    if seconds < 180:
        return "seconds", 1.0
    return ("minutes", 60.0) if seconds < 3 * 3600 else ("hours", 3600.0)
