"""What the report of a run tells, gathered from what is published: aggregates of all rows, samples of the rest."""

import base64
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from skipvar.errors import StorageError
from skipvar.quality.audit import AuditResult, summarize
from skipvar.shards.ledger import RUN_FILE, Ledger
from skipvar.shards.storage import Storage
from skipvar.shards.unitfile import DATA, ERRORS, parse_data_name, parse_error_name
from skipvar.types import Entry

MAX_PICTURES = 96
MAX_POINTS = 1500
THUMBNAIL_SIDE = 192
_COLUMNS = [
    "position", "image_index", "strategy", "probe_sobel_change", "probe_fft_high_frequency_ratio", "cost_share",
    "engine_seconds", "audit_ssim",
]  # fmt: skip


@dataclass(frozen=True)
class Thumbnail:
    """One picture of the gallery."""

    source: str
    """A `data:` URI."""
    width: int
    height: int
    prompt: str
    strategy: str
    audit_ssim: float | None


@dataclass
class RunFacts:
    """All that the page shows. Its size does not grow with the number of rows, but for the audited scores."""

    uri: str
    record: Mapping[str, Any]
    """`_run.json`."""
    num_images: int = 0
    strategies: Counter[str] = field(default_factory=Counter)
    cost_share_sum: float = 0.0
    engine_seconds: float = 0.0
    points: list[tuple[float, float, str]] = field(default_factory=list)
    """A sample of the probes: Sobel change, FFT ratio, strategy."""
    audited: dict[tuple[int, int], float] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)
    """By class."""
    error_examples: dict[str, str] = field(default_factory=dict)
    """A message of each class."""
    pictures: list[Thumbnail] = field(default_factory=list)

    @property
    def audit(self) -> AuditResult:
        """Of the audited images; its floor is the configuration's `audit.min_ssim`."""
        return summarize(self.audited.values(), (self.record.get("config", {}).get("audit") or {}).get("min_ssim"))

    @property
    def saved(self) -> float:
        """How many times fewer token-forwards than `base`."""
        return self.num_images / self.cost_share_sum if self.cost_share_sum else 1.0


def gather(storage: Storage, ending: Mapping[str, Any] | None = None) -> RunFacts:
    """Reads every unit's small columns once, and the pictures of a few. Raises `StorageError`.

    `ending`: what `_run.json` does not say yet, of a run that is about to end.
    """
    ledger = Ledger(storage)
    record = ledger.read_run()
    if record is None:
        raise StorageError(f"{storage.uri} holds no run ({RUN_FILE} is missing); give the output of one.")
    facts = RunFacts(uri=storage.uri, record={**record, **(ending or {})})
    units = [entry for entry in storage.list(DATA) if parse_data_name(entry.name)]
    points_each = max(1, math.ceil(MAX_POINTS / max(1, len(units))))
    for entry in units:
        _add_unit(facts, storage, entry, points_each)
    facts.points = facts.points[:MAX_POINTS]
    facts.pictures = _pictures(storage, units)
    _add_errors(facts, storage, ledger)
    return facts


def _add_unit(facts: RunFacts, storage: Storage, entry: Entry, num_points: int) -> None:
    with storage.open(entry.name) as file:
        table = pq.read_table(file, columns=_COLUMNS)
    facts.num_images += table.num_rows
    facts.strategies.update(table["strategy"].to_pylist())
    facts.cost_share_sum += float(np.nansum(table["cost_share"].to_numpy()))
    facts.engine_seconds += float(np.nansum(table["engine_seconds"].to_numpy()))
    rows = table.select(["probe_sobel_change", "probe_fft_high_frequency_ratio", "strategy"]).slice(0, num_points)
    seen = zip(*(column.to_pylist() for column in rows.columns), strict=True)
    facts.points += [point for point in seen if point[0] is not None and math.isfinite(point[0] + point[1])]
    scored = table.filter(table["audit_ssim"].is_valid()).to_pylist()
    facts.audited.update({(row["position"], row["image_index"]): row["audit_ssim"] for row in scored})


def _pictures(storage: Storage, units: Sequence[Entry]) -> list[Thumbnail]:
    """Pictures of units spread over the run; the least similar of the audited ones first."""
    if not units:
        return []
    step = max(1, len(units) // MAX_PICTURES)
    chosen = units[::step][:MAX_PICTURES]
    each = math.ceil(MAX_PICTURES / len(chosen))
    found: list[Thumbnail] = []
    for entry in chosen:
        with storage.open(entry.name) as file:
            columns = ["image", "prompt", "strategy", "audit_ssim"]
            batch = next(pq.ParquetFile(file).iter_batches(batch_size=each, columns=columns), None)
        found += [_thumbnail(row) for row in (batch.to_pylist() if batch is not None else [])]
    ranked = sorted(found, key=lambda shown: math.inf if shown.audit_ssim is None else shown.audit_ssim)
    return ranked[:MAX_PICTURES]


def _thumbnail(row: Mapping[str, Any]) -> Thumbnail:
    with Image.open(io.BytesIO(row["image"]["bytes"])) as opened:
        image = opened.convert("RGB")
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="WEBP", quality=85)
    source = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    return Thumbnail(source, image.width, image.height, row["prompt"], row["strategy"], row["audit_ssim"])


def _add_errors(facts: RunFacts, storage: Storage, ledger: Ledger) -> None:
    """The error rows that count, by class."""
    left = {failed.unit: set(failed.keys) for failed in ledger.failed_requests()}
    for entry in storage.list(ERRORS) if left else ():
        parsed = parse_error_name(entry.name)
        if parsed is None or not left.get(parsed[0]):
            continue
        with storage.open(entry.name) as file:
            rows = pq.read_table(file, columns=["position", "image_index", "error_class", "message"]).to_pylist()
        for row in rows:
            key = (row["position"], row["image_index"])
            if key in left[parsed[0]]:
                left[parsed[0]].discard(key)
                facts.errors[row["error_class"]] += 1
                facts.error_examples.setdefault(row["error_class"], row["message"])
