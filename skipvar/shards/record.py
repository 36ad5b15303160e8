"""`_run.json`: what a run is, what it was planned from, and how it ended."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Literal

from skipvar.shards.schema import SCHEMA_VERSION
from skipvar.types import Unit

FINGERPRINT_DIGITS = 16
MAX_UNITS = 2 * 10**7
"""Units of a run, at most: a record that tells of more is damaged."""

State = Literal["running", "finished", "finished_with_errors", "stopped"]


@dataclass(frozen=True, kw_only=True)
class InputIdentity:
    """What a run is planned from: part of its fingerprint."""

    num_rows: int
    prompts_per_unit: int
    images_per_prompt: int
    columns: Mapping[str, str]
    """The types of the user's own columns, by name."""
    files: Sequence[Mapping[str, Any]] = ()
    """Each input file's name, rows, and hash or size and version."""

    @property
    def num_requests(self) -> int:
        """Of the whole run."""
        return self.num_rows * self.images_per_prompt

    @property
    def unit_requests(self) -> int:
        """Of a full unit."""
        return self.prompts_per_unit * self.images_per_prompt

    @property
    def num_units(self) -> int:
        return -(-self.num_rows // self.prompts_per_unit)

    def unit(self, index: int) -> Unit:
        """Unit `index`, from 0: its range of prompts."""
        if not 0 <= index < self.num_units:
            raise IndexError(f"unit {index} of {self.num_units}")
        first = index * self.prompts_per_unit
        num_rows = min(self.prompts_per_unit, self.num_rows - first)
        return Unit(index=index, first_position=first, num_rows=num_rows, slices=())


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The record of one run."""

    fingerprint: str
    """`fingerprint` of the parts."""
    state: State = "running"
    schema_version: int | None = None
    parts: Mapping[str, Any] = field(default_factory=dict)
    """All that changes pixels or rows, by the names that a refusal to resume shows: it makes the fingerprint."""
    input: InputIdentity
    resolved: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    """Of Python and the packages."""
    created_at: str | None = None
    """UTC, as the other times."""
    resumed_at: str | None = None
    ended_at: str | None = None
    counts: Mapping[str, Any] = field(default_factory=dict)
    """What the last session that ended in order told."""

    @classmethod
    def from_json(cls, data: bytes) -> "RunRecord":
        """What `to_json` wrote; ValueError says what else it is."""
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            raise ValueError("not valid JSON") from None
        if not _is_record(content):
            raise ValueError("not the record of a run")
        known = {one.name: content[one.name] for one in fields(cls) if content.get(one.name) is not None}
        planned = {one.name: known["input"][one.name] for one in fields(InputIdentity) if one.name in known["input"]}
        return cls(**{**known, "input": InputIdentity(**planned)})

    def to_json(self) -> bytes:
        """The file's content, without what is not known yet."""
        content = {name: value for name, value in asdict(self).items() if value is not None}
        if not self.counts:
            del content["counts"]
        return json_file(content)

    def part(self, field_name: str, *names: str) -> Mapping[str, Any]:
        """A mapping within a field's; empty where it is lacking, as in a run that is not ended."""
        value = getattr(self, field_name)
        for name in names:
            value = value.get(name)
            if not isinstance(value, Mapping):
                return {}
        return value

    @property
    def is_resumed(self) -> bool:
        """Whether an earlier session began the run."""
        return self.resumed_at is not None

    @property
    def policy(self) -> str | None:
        """The policy's name."""
        return self.part("parts", "policy").get("name")


def fingerprint(parts: Mapping[str, Any]) -> str:
    """The hash of all that changes pixels or rows: 16 hex digits of SHA-256 over canonical JSON."""
    text = json.dumps({**parts, "schema_version": SCHEMA_VERSION}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:FINGERPRINT_DIGITS]


def json_file(value: Any) -> bytes:
    """A JSON file for people."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def now() -> str:
    """This second, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _is_record(content: Any) -> bool:
    """Whether it has what a `RunRecord` must have."""
    mappings = ("parts", "resolved", "config", "versions", "counts")
    return (
        isinstance(content, dict)
        and isinstance(content.get("fingerprint"), str)
        and isinstance(content.get("state", ""), str)
        and all(isinstance(content.get(name, {}), dict) for name in mappings)
        and _is_input(content.get("input"))
    )


def _is_input(content: Any) -> bool:
    """Whether it has what an `InputIdentity` must have."""
    if not isinstance(content, dict):
        return False
    counts = [content.get(name) for name in ("num_rows", "prompts_per_unit", "images_per_prompt")]
    columns, files = content.get("columns"), content.get("files", [])
    return (
        all(type(count) is int and 0 < count < 2**62 for count in counts)
        and content["num_rows"] <= MAX_UNITS * content["prompts_per_unit"]
        and isinstance(columns, dict)
        and all(isinstance(kind, str) for kind in columns.values())
        and isinstance(files, list)
        and all(isinstance(file, dict) and type(file.get("rows")) is int and "name" in file for file in files)
    )
