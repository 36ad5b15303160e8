"""`report.html`: a run at a glance, one file that needs no network. Everything from outside is escaped by Jinja2."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from skipvar.report.gather import RunFacts, gather
from skipvar.shards.storage import Storage

REPORT = "report.html"
COLORS = (
    "#1f6fb4", "#d1690e", "#2c8a3e", "#b5304b", "#7a55b8", "#80573f", "#c0509f", "#5f6b7a", "#7d7d12", "#0f8a94",
)  # fmt: skip
_WIDTH, _HEIGHT, _MARGIN = 520, 260, 44


@dataclass(frozen=True)
class Mark:
    """A point or a bar of a chart, in its view box."""

    x: float
    y: float
    width: float = 0.0
    height: float = 0.0
    color: str = COLORS[0]
    label: str = ""


@dataclass(frozen=True)
class Chart:
    """Marks with what the axes begin and end at."""

    marks: Sequence[Mark]
    x_ends: tuple[str, str] = ("", "")
    y_ends: tuple[str, str] = ("", "")
    width: int = _WIDTH
    height: int = _HEIGHT
    margin: int = _MARGIN


def write_report(storage: Storage, ending: Mapping[str, Any] | None = None) -> RunFacts:
    """Put the report beside the dataset; returns what it tells. `ending`: as in `gather`. Raises `StorageError`."""
    facts = gather(storage, ending)
    storage.replace(REPORT, render(facts).encode())
    return facts


def render(facts: RunFacts) -> str:
    """The page's HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("skipvar.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = [name for name, _ in facts.strategies.most_common()]
    colors = {name: COLORS[place % len(COLORS)] for place, name in enumerate(sorted(names))}
    return environment.get_template("report.html").render(
        facts=facts,
        audit=facts.audit,
        colors=colors,
        mix=[(name, facts.strategies[name], facts.strategies[name] / facts.num_images) for name in names],
        scatter=_scatter(facts.points, colors) if len(facts.points) > 1 else None,
        histogram=_histogram(list(facts.audited.values()), facts.audit.floor) if facts.audited else None,
        settings=_settings(facts.record),
    )


def _settings(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The configuration as key and value; what the run resolved is in `_run.json`."""
    flat: list[tuple[str, str]] = []

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict) and value:
            for inner, below in value.items():
                walk(below, f"{key}.{inner}" if key else str(inner))
        else:
            flat.append((key, value if isinstance(value, str) else json.dumps(value, default=str)))

    walk(record.get("config") or {}, "")
    return flat


def _scatter(points: Sequence[tuple[float, float, str]], colors: dict[str, str]) -> Chart:
    (left, right), (low, high) = _span([point[0] for point in points]), _span([point[1] for point in points])
    marks = [
        Mark(
            x=_MARGIN + (x - left) / (right - left) * (_WIDTH - 2 * _MARGIN),
            y=_HEIGHT - _MARGIN - (y - low) / (high - low) * (_HEIGHT - 2 * _MARGIN),
            color=colors[strategy],
        )
        for x, y, strategy in points
    ]
    return Chart(marks, (f"{left:.3g}", f"{right:.3g}"), (f"{low:.3g}", f"{high:.3g}"))


def _histogram(scores: Sequence[float], floor: float | None, num_bins: int = 20) -> Chart:
    """Bars from the lowest score to 1; those under the floor in another colour."""
    start = min(min(scores), floor if floor is not None else 1.0, 0.95)
    step = (1.0 - start) / num_bins
    bins = [0] * num_bins
    for score in scores:
        bins[min(num_bins - 1, max(0, int((score - start) / step)))] += 1
    each = (_WIDTH - 2 * _MARGIN) / num_bins
    marks = []
    for place, count in enumerate(bins):
        height = count / max(bins) * (_HEIGHT - 2 * _MARGIN)
        is_under = floor is not None and start + (place + 0.5) * step < floor
        label = f"{count} between {start + place * step:.3f} and {start + (place + 1) * step:.3f}"
        corner = (_MARGIN + place * each, _HEIGHT - _MARGIN - height)
        marks.append(Mark(*corner, each - 1, height, COLORS[3] if is_under else COLORS[0], label))
    return Chart(marks, (f"{start:.3f}", "1"), ("0", str(max(bins))))


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
