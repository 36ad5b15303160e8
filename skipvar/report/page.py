"""`report.html`: a run at a glance, one file that needs no network. Everything from outside is escaped by Jinja2."""

import base64
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from PIL import Image

from skipvar.errors import StorageError
from skipvar.quality.audit_book import AuditAlarm
from skipvar.report.charts import histogram, scatter, throughput, work_time
from skipvar.report.gather import RunFacts, gather
from skipvar.shards.ledger import RUN_FILE
from skipvar.shards.storage import Storage

REPORT = "report.html"
NUM_HUES = 10
"""Colours from the dearest strategy to the cheapest; those in use are spread over them."""


@dataclass(frozen=True)
class Tile:
    """A number of the headline."""

    number: str
    what: str
    more: str = ""
    is_bad: bool = False


def write_report(storage: Storage, ending: Mapping[str, Any] | None = None) -> RunFacts:
    """Put the report beside the dataset; returns what it tells. `ending`: as in `gather`. Raises `StorageError`."""
    facts = gather(storage, ending)
    try:
        page = render(facts)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, jinja2.UndefinedError) as error:
        raise StorageError(
            f"{storage.uri}/{RUN_FILE} is damaged: what it tells of the run cannot be shown ({error})."
        ) from error
    storage.replace(REPORT, page.encode(errors="replace"))  # a damaged record may hold half a character
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
    environment.filters.update(uri=_uri, size=_size, sha256=_sha256)
    record, styles = facts.record, _styles(facts.strategy_names)
    return environment.get_template("report.html").render(
        facts=facts,
        model=record.part("parts", "model").get("name", "?"),
        state=record.state.replace("_", " "),
        verdict=_verdict(facts),
        alarm=_alarm(facts),
        tiles=_tiles(facts),
        styles=styles,
        scatter=scatter(facts.points, styles),
        histogram=histogram(facts.scores, facts.audit.floor),
        throughput=throughput(facts.stretches),
        fills=_fills(record.part("counts", "engine")),
        settings=list(_flat(record.config)),
        identity=_flat({name: getattr(record, name) for name in ("fingerprint", "parts", "versions", "created_at")}),
    )


def _uri(file: bytes) -> str:
    """A WebP file as a `data:` URI."""
    return "data:image/webp;base64," + base64.b64encode(file).decode()


def _sha256(text: str) -> str:
    """As a content security policy names a script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _size(file: bytes) -> tuple[int, int]:
    """Width and height of an image file."""
    with Image.open(io.BytesIO(file)) as opened:
        return opened.size


def _styles(names: Sequence[str]) -> dict[str, str]:
    """The CSS class of each strategy: from the dearest to the cheapest, as far apart as can be."""
    most = max(1, len(names) - 1)
    return {name: f"hue-{round(place * (NUM_HUES - 1) / most)}" for place, name in enumerate(names)}


def _verdict(facts: RunFacts) -> str:
    """The run in a sentence or two."""
    asked, errors, made = facts.record.input.num_requests, facts.errors.total(), facts.num_images
    if made and made == asked:
        said = "Every image that was asked for is here"
    elif made + errors == asked:
        said = f"{made:,} of {asked:,} images are here; {errors:,} could not be made"
    else:
        said = f"{made:,} of {asked:,} images are here so far"
    if made:
        faster = f", {facts.speed:.2f} times faster" if facts.speed is not None else ""
        said += f", made with {facts.saved:.2f} times less computing{faster} than in full"
    audit, promise = facts.audit, facts.promise
    if audit.mean_ssim is None:
        return f"{said}. How similar they are to images made in full was not measured ({_unmeasured(facts)})."
    said += f". Of {audit.images:,} that were made in full as well, "
    if audit.floor is None:
        return f"{said}the mean similarity (SSIM) is {audit.mean_ssim:.3f}."
    said += f"{audit.misses:,} ({100 * audit.share:.1f}%) fell under the similarity floor of {audit.floor:g}"
    return f"{said}; at most {100 * promise.alpha:g}% were promised." if promise else f"{said}."


def _unmeasured(facts: RunFacts) -> str:
    """Why no image was audited."""
    fraction = facts.record.part("config", "audit").get("fraction")
    return f"no image was drawn at an audit.fraction of {fraction:g}" if fraction else "audit.fraction is 0"


def _alarm(facts: RunFacts) -> str | None:
    alarm = facts.record.part("counts", "audit_state", "alarm")
    if not alarm or facts.promise is None:
        return None
    return f"{AuditAlarm(**alarm).text(facts.promise)}, at {alarm['raised_at']}."


def _tiles(facts: RunFacts) -> list[Tile]:
    made, audit = facts.num_images, facts.audit
    less = "less computing than base"
    if facts.speed is None:
        speed = Tile(f"{facts.saved:.2f}×", less, "in token-forwards; not timed")
    else:
        more = f"by the clock, on audited images; {facts.saved:.2f}× {less}"
        speed = Tile(f"{facts.speed:.2f}×", "faster than base", more)
    tiles = [Tile(f"{made:,}", "images"), speed]
    if audit.mean_ssim is not None and audit.mean_interval is not None:
        ends = " to ".join(f"{end:.3f}" for end in audit.mean_interval)
        tiles.append(Tile(f"{audit.mean_ssim:.3f}", "mean SSIM to base", f"95%: {ends}; {audit.images:,} audited"))
        if audit.floor is not None:
            ends = " to ".join(f"{100 * end:.1f}" for end in audit.interval)
            is_bad = facts.promise is not None and audit.interval[0] > facts.promise.alpha
            tiles.append(Tile(f"{100 * audit.share:.1f}%", f"under {audit.floor:g}", f"95%: {ends}%", is_bad))
    else:
        tiles.append(Tile("–", "similarity", f"not measured: {_unmeasured(facts)}"))
    num_errors = facts.errors.total()
    tiles.append(Tile(f"{num_errors:,}", "error" if num_errors == 1 else "errors", is_bad=num_errors > 0))
    seconds = work_time(facts.stretches).seconds
    if seconds > 1:
        tiles.append(Tile(f"{made / seconds:.3g}/s", "images per second", f"{_duration(seconds)} at work"))
    return [*tiles, _cost(facts)]


def _cost(facts: RunFacts) -> Tile:
    """In money, where a replica has a price; else in devices' time."""
    usd = facts.record.part("counts", "cost").get("usd")
    if usd is not None:
        each = f"${usd / facts.num_images:.2g} per image" if facts.num_images else ""
        return Tile(f"${usd:,.2f}", "cost", each)
    each = f"{facts.engine_seconds / facts.num_images:.2g} s per image" if facts.num_images else ""
    return Tile(_duration(facts.engine_seconds), "device time", each)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def _fills(engine: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The batches of each kind, as the engine's statistics in `_run.json` tell them: `batches`, `images`, `fill`."""
    kinds = {"prefix": engine.get("prefix") or {}}
    for kind in ("suffix", "whole"):
        kinds |= {f"{kind} {name}": batches for name, batches in (engine.get(kind) or {}).items()}
    return {kind: batches for kind, batches in kinds.items() if batches.get("batches")}


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Keys with dots, and values."""
    if isinstance(value, Mapping) and (value or not key):
        for inner, below in value.items():
            yield from _flat(below, f"{key}.{inner}" if key else str(inner))
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, default=str)
