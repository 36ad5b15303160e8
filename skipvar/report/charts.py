"""The charts of the report as marks in a view box; the template draws them as SVG, and CSS gives them their colours."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from skipvar.report.gather import Stretch
from skipvar.report.points import Point

PHASES = ("text", "prefix", "probe", "suffix", "decode")
"""Of the engine's work, in their order."""
_MAX_TIME_BINS = 48
_SCORE_BINS = 24
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
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    x_name: str
    y_name: str
    told: str
    """For who cannot see it."""
    cuts: Sequence[float] = ()
    """Where the x axis leaves something out."""
    line: Tick | None = None
    """A labelled vertical line."""
    legend: Sequence[tuple[str, str]] = ()
    """CSS class and name of what the colours stand for."""
    width: int = 440
    height: int = 250
    left: int = 46
    right: int = 428
    top: int = 26
    bottom: int = 206


_FRAME = Chart(marks=(), x_ticks=(), y_ticks=(), x_name="", y_name="", told="")


@dataclass
class _Axis:
    """From values to places in the view box, with round ticks."""

    low: float
    high: float
    first: float
    last: float
    ticks: list[Tick] = field(default_factory=list)

    def place(self, value: float) -> float:
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)


def scatter(points: Sequence[Point], styles: Mapping[str, str]) -> Chart | None:
    """What a sample of images was decided by, coloured by strategy; None of fewer than two."""
    if len(points) < 2:
        return None
    x, y = _axis([point.x for point in points]), _axis([point.y for point in points], is_vertical=True)
    marks = [
        Mark(x.place(p.x), y.place(p.y), style=styles[p.strategy], label=f"{p.strategy}: {p.x:.3g}, {p.y:.3g}")
        for p in points
    ]
    shown = Counter(point.strategy for point in points)
    is_chance = points[0].is_chance
    return Chart(
        marks=marks,
        x_ticks=x.ticks,
        y_ticks=y.ticks,
        x_name="chance that skip_1 keeps the floor" if is_chance else "change of edges (Sobel)",
        y_name="chance that skip_3 keeps it" if is_chance else "share of high frequencies (FFT)",
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
    x = _axis([low, 1.0], pad=0.0)
    y = _axis([0.0, float(bins.max())], is_vertical=True, pad=0.0, are_whole=True)
    marks = [
        Mark(x.place(left) + 0.5, y.place(count), x.place(right) - x.place(left) - 1, y.first - y.place(count),
             "under" if floor is not None and right <= floor + (right - left) / 2 else "accent",
             f"{count:,} images from {left:.3f} to {right:.3f}")
        for count, left, right in zip(bins.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        if count
    ]  # fmt: skip
    under = "" if floor is None else f", {int((scores < floor).sum())} of them under {floor:g}"
    return Chart(
        marks=marks,
        x_ticks=x.ticks,
        y_ticks=y.ticks,
        x_name="SSIM to base (1: the same picture)",
        y_name="audited images",
        told=f"Histogram of the SSIM of {scores.size:,} audited images{under}, from {scores.min():.3f} to "
        f"{scores.max():.3f}.",
        line=None if floor is None else Tick(x.place(floor), f"floor {floor:g}"),
    )


@dataclass(frozen=True)
class WorkTime:
    """Stretches on one clock that stands still while nothing is made."""

    spans: Sequence[tuple[float, float]]
    """Begin and end of each stretch, in seconds at work."""
    cuts: Sequence[float]
    """When the clock stood still."""
    seconds: float


def work_time(stretches: Sequence[Stretch]) -> WorkTime:
    """Leaves out what a stopped run was not at work."""
    spans: list[tuple[float, float]] = []
    cuts: list[float] = []
    ordered = sorted(range(len(stretches)), key=lambda place: stretches[place].start)
    shift = end = stretches[ordered[0]].start if stretches else 0.0
    moved: dict[int, tuple[float, float]] = {}
    for place in ordered:
        stretch = stretches[place]
        if stretch.start - end > _IDLE_SECONDS:
            cuts.append(end - shift)
            shift += stretch.start - end
        moved[place] = (stretch.start - shift, stretch.end - shift)
        end = max(end, stretch.end)
    spans = [moved[place] for place in range(len(stretches))]
    return WorkTime(spans, cuts, end - shift)


def throughput(stretches: Sequence[Stretch]) -> Chart | None:
    """Images a second over the time at work; the colours share a bar out by what the devices' time went into."""
    clock = work_time(stretches)
    if clock.seconds < 2:
        return None
    num_bins = min(_MAX_TIME_BINS, max(4, int(clock.seconds / 2)))
    width = clock.seconds / num_bins
    images = np.zeros(num_bins)
    names = [name for name in PHASES if any(stretch.phase_seconds.get(name) for stretch in stretches)] or ["all"]
    work = np.zeros((len(names), num_bins))
    for stretch, span in zip(stretches, clock.spans, strict=True):
        share = _spread(span, width, num_bins)
        images += stretch.images * share
        seconds = np.array([stretch.phase_seconds.get(name, 0.0) for name in names])
        work += np.outer(seconds if seconds.sum() else np.ones(len(names)), share)
    rates = images / width
    parts = rates * work / np.maximum(work.sum(axis=0), 1e-12)
    unit, unit_seconds = _time_unit(clock.seconds)
    x = _axis([0.0, clock.seconds / unit_seconds], pad=0.0)
    y = _axis([0.0, float(rates.max())], is_vertical=True, pad=0.0)
    marks = []
    for at in range(num_bins):
        left, right = (x.place(edge * width / unit_seconds) for edge in (at, at + 1))
        reached = 0.0
        for name, part in zip(names, parts[:, at].tolist(), strict=True):
            top, low = y.place(reached + part), y.place(reached)
            reached += part
            if part > 0:
                label = f"{name}: {100 * part / rates[at]:.0f}% of {rates[at]:.2g} images/s"
                marks.append(Mark(left + 0.3, top, right - left - 0.6, low - top, f"phase-{name}", label))
    total = work.sum(axis=1) / work.sum()
    mix = ", ".join(f"{name} {100 * share:.0f}%" for name, share in zip(names, total.tolist(), strict=True))
    mean = images.sum() / clock.seconds
    return Chart(
        marks=marks,
        x_ticks=x.ticks,
        y_ticks=y.ticks,
        x_name=f"{unit} at work",
        y_name="images per second",
        told=f"{mean:.2g} images per second over {clock.seconds / unit_seconds:.3g} {unit}. Device time: {mix}.",
        cuts=[x.place(cut / unit_seconds) for cut in clock.cuts],
        legend=[
            (f"phase-{name}", f"{name} {100 * share:.0f}%") for name, share in zip(names, total.tolist(), strict=True)
        ],
    )


def _spread(span: tuple[float, float], width: float, num_bins: int) -> np.ndarray:
    """`(num_bins,)`: the share of a span that lies in each bin; they sum to one."""
    start, end = span
    if end - start < width / 100:
        share = np.zeros(num_bins)
        share[min(num_bins - 1, int(start / width))] = 1.0
        return share
    edges = np.clip(np.arange(num_bins + 1) * width, start, end)
    overlap = np.diff(edges)
    return overlap / overlap.sum()


def _time_unit(seconds: float) -> tuple[str, float]:
    if seconds < 180:
        return "seconds", 1.0
    return ("minutes", 60.0) if seconds < 3 * 3600 else ("hours", 3600.0)


def _axis(values: Sequence[float], *, is_vertical: bool = False, pad: float = 0.03, are_whole: bool = False) -> _Axis:
    """An axis that holds all values, with about five round ticks; a vertical one grows upwards."""
    low, high = min(values), max(values)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    low, high = low - pad * (high - low), high + pad * (high - low)
    if is_vertical and pad == 0.0:
        high *= 1.04
    ends = (_FRAME.bottom, _FRAME.top) if is_vertical else (_FRAME.left, _FRAME.right)
    axis = _Axis(low, high, *ends)
    step = _round_step((high - low) / 4)
    step = max(1.0, round(step)) if are_whole else step
    show = _label(step)
    first = math.ceil(low / step - 1e-9)
    count = int((high - first * step) / step + 1e-9) + 1
    axis.ticks = [Tick(axis.place((first + n) * step), show((first + n) * step)) for n in range(count)]
    return axis


def _round_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, not far from `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.7) * power


def _label(step: float) -> Callable[[float], str]:
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return lambda value: f"{value + 0.0:,.{decimals}f}"
