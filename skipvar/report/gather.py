"""What the report of a run tells, gathered from what is published: aggregates of all rows, samples of the rest.

Every data file is read once, and of it only small columns; pictures are read of a few. So a night of a million images
takes little memory and a page of a few megabytes.
"""

import heapq
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from skipvar.errors import NotFoundError, StorageError
from skipvar.quality.audit import AuditResult, summarize
from skipvar.report.sheet import Picture, first_pictures
from skipvar.shards.ledger import RUN_FILE, Ledger
from skipvar.shards.pairs import AuditPair, pairs_name, read_pairs, small, worst
from skipvar.shards.record import RunRecord
from skipvar.shards.storage import Storage
from skipvar.shards.unitfile import UnitFooter, data_files, open_unit, readable
from skipvar.skip.policy import Promise

MAX_PICTURES = 96
MAX_PAIRS_SHOWN = 24
MAX_POINTS = 1500
_THREADS = 8
_PROBE = ("probe_sobel_change", "probe_fft_high_frequency_ratio")
_CHANCES = ("skip_1", "skip_3")
_COLUMNS = [
    *_PROBE,
    *(f"strategy_scores.{name}" for name in _CHANCES),
    *("strategy", "cost_share", "engine_seconds", "audit_ssim", "created_at"),
]


@dataclass(frozen=True, slots=True)
class Point:
    """What one image's strategy was chosen from."""

    x: float
    """Sobel change; where no probe was decoded, the chance of `skip_1` to keep the floor."""
    y: float
    """FFT high-frequency ratio; else the chance of `skip_3`."""
    strategy: str
    is_chance: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """When a unit's images were made, and what devices did meanwhile."""

    start: float
    """Seconds since 1970, of the first image,"""
    end: float
    """and of the last."""
    images: int
    phase_seconds: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitFacts:
    """What the small columns of one data file say."""

    name: str
    strategies: Mapping[str, int]
    """Images of each."""
    cost_shares: Mapping[str, float]
    """By strategy, summed."""
    engine_seconds: float
    points: Sequence[Point]
    """Of its first images."""
    scores: np.ndarray
    """`(audited images,)` float64: their SSIM."""
    stretch: Stretch | None
    """None of a file without rows."""
    audit_seconds: Mapping[str, float]
    """As in `UnitFooter`."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """All that the page shows. Its size does not grow with the number of rows, but for the audited scores (eight bytes
    each) and a few numbers a unit."""

    uri: str
    record: RunRecord
    units: Sequence[UnitFacts]
    errors: Counter[str]
    """By class."""
    error_examples: Mapping[str, str]
    """A message of each class."""
    pictures: Sequence[Picture]
    """Small ones, from all over the run."""
    pairs: Sequence[AuditPair]
    """The audited images least like `base`, the worst first."""

    @property
    def num_images(self) -> int:
        return self.strategies.total()

    @cached_property
    def strategies(self) -> Counter[str]:
        """Images of each."""
        return _total(unit.strategies for unit in self.units)

    @cached_property
    def cost_shares(self) -> Counter[str]:
        """By strategy, summed over its images."""
        return _total(unit.cost_shares for unit in self.units)

    @cached_property
    def audit_seconds(self) -> Counter[str]:
        """The engine's time for the audited images: `made` as decided, and `base`."""
        return _total(unit.audit_seconds for unit in self.units)

    @property
    def engine_seconds(self) -> float:
        return sum(unit.engine_seconds for unit in self.units)

    @cached_property
    def points(self) -> list[Point]:
        """Of a sample of the images."""
        found = [point for unit in self.units for point in unit.points]
        return found[:: max(1, len(found) // MAX_POINTS)][:MAX_POINTS]

    @cached_property
    def scores(self) -> np.ndarray:
        """SSIM of the audited images."""
        return np.concatenate([np.empty(0), *(unit.scores for unit in self.units)])

    @property
    def stretches(self) -> list[Stretch]:
        return [unit.stretch for unit in self.units if unit.stretch is not None]

    @property
    def promise(self) -> Promise | None:
        """What audits watch over."""
        said = self.record.part("counts", "audit_state", "promise") or self.record.part("resolved", "promise")
        return Promise(**said) if said else None

    @cached_property
    def audit(self) -> AuditResult:
        """Of the audited images; its floor is the promise's, else the configuration's `audit.min_ssim`."""
        asked = self.record.part("config", "audit").get("min_ssim")
        return summarize(self.scores, self.promise.floor if self.promise else asked)

    @property
    def saved(self) -> float:
        """How many times fewer token-forwards than `base`."""
        return self.num_images / self.cost_shares.total() if self.num_images else 1.0

    @property
    def speed(self) -> float | None:
        """How many times faster than `base`, by the engine's clock, on the audited images; None: not measured."""
        return self.audit_seconds["base"] / self.audit_seconds["made"] if self.audit_seconds["made"] else None

    @property
    def strategy_names(self) -> list[str]:
        """From the dearest to the cheapest."""
        return sorted(self.strategies, key=lambda name: (-self.cost_shares[name] / self.strategies[name], name))


def gather(storage: Storage, ending: Mapping[str, Any] | None = None) -> RunFacts:
    """Reads every unit's small columns once, and the pictures of a few. Raises `StorageError`.

    `ending`: what `_run.json` does not say yet, of a run that is about to end.
    """
    ledger = Ledger(storage)
    record = ledger.read_run()
    if record is None:
        raise StorageError(f"{storage.uri} holds no run ({RUN_FILE} is missing); give the output of one.")
    names = [name for _, name in data_files(storage)]
    points_each = math.ceil(MAX_POINTS / max(1, len(names)))
    with ThreadPoolExecutor(_THREADS) as pool:
        units = list(pool.map(lambda name: _read_unit(storage, name, points_each), names))
        pictures = _pictures(storage, names, pool)
    errors, examples = _errors(ledger)
    return RunFacts(
        uri=storage.uri,
        record=replace(record, **(ending or {})),
        units=units,
        errors=errors,
        error_examples=examples,
        pictures=pictures,
        pairs=_pairs(storage, units),
    )


def _total(parts: Iterable[Mapping[str, Any]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return total


def _read_unit(storage: Storage, name: str, num_points: int) -> UnitFacts:
    with open_unit(storage, name) as parquet:
        table = parquet.read(columns=_COLUMNS, use_threads=False)
        footer = UnitFooter.from_metadata(parquet.metadata.metadata or {})
    groups = table.group_by("strategy", use_threads=False).aggregate([("cost_share", "count"), ("cost_share", "sum")])
    by_strategy = groups.to_pylist()
    return UnitFacts(
        name=name,
        strategies={row["strategy"]: row["cost_share_count"] for row in by_strategy},
        cost_shares={row["strategy"]: row["cost_share_sum"] for row in by_strategy},
        engine_seconds=pc.sum(table["engine_seconds"]).as_py() or 0.0,
        points=read_points(table.slice(0, num_points)),
        scores=table["audit_ssim"].drop_null().to_numpy(),
        stretch=_stretch(table, footer.phase_seconds),
        audit_seconds=footer.audit_seconds,
    )


def _stretch(table: pa.Table, phase_seconds: Mapping[str, float]) -> Stretch | None:
    if not table.num_rows:
        return None
    ends = pc.min_max(table["created_at"]).as_py()
    start, end = ends["min"].timestamp(), ends["max"].timestamp()
    return Stretch(start=start, end=end, images=table.num_rows, phase_seconds=phase_seconds)


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


def _pictures(storage: Storage, names: Sequence[str], pool: ThreadPoolExecutor) -> list[Picture]:
    """Pictures of units spread over the run."""
    if not names:
        return []
    chosen = names[:: max(1, len(names) // MAX_PICTURES)][:MAX_PICTURES]
    each = math.ceil(MAX_PICTURES / len(chosen))
    found = pool.map(lambda name: _small_pictures(storage, name, each), chosen)
    return [picture for of_unit in found for picture in of_unit][:MAX_PICTURES]


def _small_pictures(storage: Storage, name: str, count: int) -> list[Picture]:
    """Of a unit, its first ones."""
    found = []
    with readable(f"{storage.uri}/{name}"):
        for picture in first_pictures(storage, name, count):
            with Image.open(io.BytesIO(picture.image)) as opened:
                found.append(replace(picture, image=small(opened)))
    return found


def _pairs(storage: Storage, units: Sequence[UnitFacts]) -> list[AuditPair]:
    """The worst pairs lie in the units with the lowest scores."""
    lowest = [(float(unit.scores.min()), unit.name) for unit in units if unit.scores.size]
    found: list[AuditPair] = []
    for _, name in heapq.nsmallest(MAX_PAIRS_SHOWN, lowest):
        try:
            with readable(f"{storage.uri}/{pairs_name(name)}"):
                found += read_pairs(storage, pairs_name(name))
        except NotFoundError:  # made before there were pairs, or all that was audited is the same as under `base`
            continue
    return worst(found, MAX_PAIRS_SHOWN)


def _errors(ledger: Ledger) -> tuple[Counter[str], dict[str, str]]:
    """The error rows that count, by class, and a message of each."""
    errors, examples = Counter[str](), dict[str, str]()
    for failed in ledger.failed_requests():
        for row in failed.rows.values():
            errors[row["error_class"]] += 1
            examples.setdefault(row["error_class"], row["message"])
    return errors, examples
