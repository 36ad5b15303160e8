"""What the report of a run tells, gathered from what is published: aggregates of all rows, samples of the rest.

Every data file is read once, and of it only small columns; pictures are read of a few. So a night of a million images
takes little memory and a page of a few megabytes.
"""

import heapq
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from skipvar.errors import NotFoundError, StorageError
from skipvar.quality.audit import AuditResult, summarize
from skipvar.report.points import POINT_COLUMNS, Point, read_points
from skipvar.report.sheet import Picture
from skipvar.shards.ledger import RUN_FILE, Ledger
from skipvar.shards.pairs import AuditPair, pairs_name, read_pairs, small, worst
from skipvar.shards.record import RunRecord
from skipvar.shards.storage import Storage
from skipvar.shards.unitfile import UnitFooter, data_files, open_unit, readable

MAX_PICTURES = 96
MAX_PAIRS_SHOWN = 24
MAX_POINTS = 1500
_THREADS = 8
_STREAM_BYTES = 1 << 16
_COLUMNS = [*POINT_COLUMNS, "strategy", "cost_share", "engine_seconds", "audit_ssim", "created_at"]


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """When a unit's images were made, and what devices did meanwhile."""

    start: float
    """Seconds since 1970, of the first image,"""
    end: float
    """and of the last."""
    images: int
    phase_seconds: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class UnitFacts:
    """What the small columns of one data file say."""

    name: str
    images: int
    strategies: Mapping[str, int]
    cost_shares: Mapping[str, float]
    """By strategy, summed."""
    engine_seconds: float
    points: Sequence[Point]
    scores: np.ndarray
    """`(audited images,)` float64."""
    stretch: Stretch | None
    """None of a file without rows."""
    audit_seconds: Mapping[str, float]
    """As in `UnitFooter`."""


@dataclass
class RunFacts:
    """All that the page shows. Its size does not grow with the number of rows, but for the audited scores (eight bytes
    each) and a few numbers a unit."""

    uri: str
    record: RunRecord
    num_images: int = 0
    strategies: Counter[str] = field(default_factory=Counter)
    cost_shares: Counter[str] = field(default_factory=Counter)
    """By strategy, summed."""
    engine_seconds: float = 0.0
    points: list[Point] = field(default_factory=list)
    """A sample of the images."""
    scores: np.ndarray = field(default_factory=lambda: np.empty(0))
    """SSIM of the audited images."""
    stretches: list[Stretch] = field(default_factory=list)
    audit_seconds: Counter[str] = field(default_factory=Counter)
    """The engine's time for the audited images: `made` as decided, and `base`."""
    errors: Counter[str] = field(default_factory=Counter)
    """By class."""
    error_examples: dict[str, str] = field(default_factory=dict)
    """A message of each class."""
    pictures: list[Picture] = field(default_factory=list)
    """Small ones, from all over the run."""
    pairs: list[AuditPair] = field(default_factory=list)
    """The audited images least like `base`, the worst first."""

    @property
    def promise(self) -> Mapping[str, Any] | None:
        """What audits watch over: `floor`, `alpha`, `delta`."""
        said = self.record.part("counts", "audit_state", "promise")
        return said or self.record.part("resolved", "promise") or None

    @cached_property
    def audit(self) -> AuditResult:
        """Of the audited images; its floor is the promise's, else the configuration's `audit.min_ssim`."""
        asked = self.record.part("config", "audit").get("min_ssim")
        return summarize(self.scores, (self.promise or {}).get("floor", asked))

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
    facts = RunFacts(uri=storage.uri, record=replace(record, **(ending or {})))
    names = [name for _, name in data_files(storage)]
    points_each = max(1, math.ceil(MAX_POINTS / max(1, len(names))))
    scores, lowest = [facts.scores], list[tuple[float, str]]()
    with ThreadPoolExecutor(_THREADS) as pool:
        for unit in pool.map(lambda name: _read_unit(storage, name, points_each), names):
            _add_unit(facts, unit)
            scores.append(unit.scores)
            if unit.scores.size:
                lowest.append((float(unit.scores.min()), unit.name))
        facts.scores = np.concatenate(scores)
        facts.points = facts.points[:: max(1, len(facts.points) // MAX_POINTS)][:MAX_POINTS]
        facts.pictures = _pictures(storage, names, pool)
    facts.pairs = _pairs(storage, [name for _, name in heapq.nsmallest(MAX_PAIRS_SHOWN, lowest)])
    _add_errors(facts, ledger)
    return facts


def _read_unit(storage: Storage, name: str, num_points: int) -> UnitFacts:
    with open_unit(storage, name) as parquet:
        table = parquet.read(columns=_COLUMNS, use_threads=False)
        footer = UnitFooter.from_metadata(parquet.metadata.metadata or {})
    groups = table.group_by("strategy", use_threads=False).aggregate([("cost_share", "count"), ("cost_share", "sum")])
    by_strategy = groups.to_pylist()
    return UnitFacts(
        name=name,
        images=table.num_rows,
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


def _add_unit(facts: RunFacts, unit: UnitFacts) -> None:
    facts.num_images += unit.images
    facts.strategies.update(unit.strategies)
    facts.cost_shares.update(unit.cost_shares)
    facts.engine_seconds += unit.engine_seconds
    facts.points += unit.points
    facts.stretches += [] if unit.stretch is None else [unit.stretch]
    facts.audit_seconds.update(unit.audit_seconds)


def _pictures(storage: Storage, names: Sequence[str], pool: ThreadPoolExecutor) -> list[Picture]:
    """Pictures of units spread over the run."""
    if not names:
        return []
    chosen = names[:: max(1, len(names) // MAX_PICTURES)][:MAX_PICTURES]
    each = math.ceil(MAX_PICTURES / len(chosen))
    found = pool.map(lambda name: _first_pictures(storage, name, each), chosen)
    return [picture for of_unit in found for picture in of_unit][:MAX_PICTURES]


def _first_pictures(storage: Storage, name: str, count: int) -> list[Picture]:
    """The first pictures of a unit: the file's column of images is streamed, and left where they end."""
    columns = ["image", "prompt", "strategy"]
    with open_unit(storage, name, buffer_size=_STREAM_BYTES) as parquet:
        batch = next(parquet.iter_batches(batch_size=count, columns=columns, use_threads=False), None)
        return [_small_picture(row) for row in (batch.to_pylist() if batch is not None else [])]


def _small_picture(row: Mapping[str, Any]) -> Picture:
    with Image.open(io.BytesIO(row["image"]["bytes"])) as opened:
        return Picture(small(opened), row["prompt"], row["strategy"])


def _pairs(storage: Storage, names: Sequence[str]) -> list[AuditPair]:
    """The worst pairs lie in the units with the lowest scores."""
    found: list[AuditPair] = []
    for name in names:
        try:
            with readable(f"{storage.uri}/{pairs_name(name)}"):
                found += read_pairs(storage, pairs_name(name))
        except NotFoundError:  # made before there were pairs, or all that was audited is the same as under `base`
            continue
    return worst(found, MAX_PAIRS_SHOWN)


def _add_errors(facts: RunFacts, ledger: Ledger) -> None:
    """The error rows that count, by class."""
    for failed in ledger.failed_requests():
        for row in failed.rows.values():
            facts.errors[row["error_class"]] += 1
            facts.error_examples.setdefault(row["error_class"], row["message"])
