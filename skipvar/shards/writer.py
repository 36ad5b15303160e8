"""A unit's images and failures become its files; the data file's appearance is the unit's only commit."""

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from skipvar.config import OutputConfig, StorageConfig
from skipvar.errors import StorageError
from skipvar.shards.encode import encode_image
from skipvar.shards.pairs import AuditPair, make_pair, pairs_file, pairs_name
from skipvar.shards.schema import dataset_schema, error_schema, own_names, trial_to_columns
from skipvar.shards.storage import Storage
from skipvar.shards.unitfile import (
    UnitFile,
    UnitFooter,
    data_name,
    error_name,
    read_columns,
    read_unit_footer,
)
from skipvar.types import Failure, Image, RequestKey, Unit, UnitReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """What is the same for all units of a run; small and picklable."""

    output: str
    """A folder or `s3://bucket/prefix`, with no placeholders left in it."""
    storage: StorageConfig
    form: OutputConfig
    """How images and row groups are written; its path may have placeholders."""
    images_per_prompt: int
    columns: pa.Schema
    """The user's own, as the plan has them."""
    model: str
    """The names of model and policy, for the rows; and the run's fingerprint."""
    policy: str
    fingerprint: str


class UnitWriter:
    """Gathers one unit and publishes it. `add` may be called from several threads at once, `publish` once, after."""

    def __init__(self, unit: Unit, spec: DatasetSpec, replica: str, attempt: int, storage: Storage) -> None:
        """`storage`: the one at `spec.output`."""
        self._unit = unit
        self._spec = spec
        self._replica = replica
        self._attempt = attempt
        self._storage = storage
        self._names = own_names(spec.columns.names)
        self._rows: dict[RequestKey, dict[str, Any]] = {}
        self._failures: dict[RequestKey, Failure] = {}
        self._pairs: list[AuditPair] = []
        self._phase_seconds: Counter[str] = Counter()
        self._audit_seconds: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, item: Image | Failure) -> None:
        """Take a result; encodes an image here, in the caller's thread."""
        if isinstance(item, Failure):
            with self._lock:
                self._check_new(item.key)
                self._failures[item.key] = item
            return
        row = self._row(item)
        pair = None if item.base_pixels is None else make_pair(item)
        with self._lock:
            self._check_new(item.request.key)
            self._rows[item.request.key] = row
            self._pairs += [] if pair is None else [pair]
            self._phase_seconds.update(item.phase_seconds)
            if item.base_seconds is not None:
                self._audit_seconds.update({"made": item.engine_seconds, "base": item.base_seconds})

    def publish(self) -> UnitReport:
        """Write the errors, then the data file, unless another worker published the unit: that is success too.

        Raises `StorageError`; nothing of the unit is visible under `data/` then.
        """
        expected = set(self._unit.keys(self._spec.images_per_prompt))
        made = self._rows.keys() | self._failures.keys()
        assert made == expected, f"unit {self._unit.index}: {len(expected ^ made)} requests are missing or too many"
        name = data_name(self._unit.index, self._unit.retry)
        errors = self._publish_errors() if self._failures else None
        if self._pairs:
            self._storage.put_if_absent(pairs_name(name), pairs_file(self._pairs))
        rows = [(row["strategy"], row["audit_ssim"]) for row in self._rows.values()]
        data, footer = self._data_file(errors)
        published = footer if self._storage.put_if_absent(name, data) else self._published(name)
        same = published.content_hash == footer.content_hash
        if not same:
            logger.warning("%s was published by another worker with other content", name)
            table = read_columns(self._storage, name, ["strategy", "audit_ssim"])
            rows = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
        return UnitReport(
            unit=self._unit.index,
            num_images=published.rows,
            num_failures=published.error_rows,
            same_content=same,
            strategies=Counter(strategy for strategy, _ in rows),
            audit_scores=tuple(score for _, score in rows if score is not None),
        )

    def _check_new(self, key: RequestKey) -> None:
        assert key not in self._rows and key not in self._failures, f"request {key} ended twice"

    def _row(self, image: Image) -> dict[str, Any]:
        request, spec = image.request, self._spec
        height, width, _ = image.pixels.shape
        return {
            "id": request.id,
            "position": request.position,
            "image_index": request.image_index,
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "seed": request.seed,
            "image": {
                "bytes": encode_image(image.pixels, spec.form.image_format),
                "path": f"{request.position:012d}-{request.image_index}.{spec.form.image_format}",
            },
            "width": width,
            "height": height,
            "format": spec.form.image_format,
            "strategy": image.strategy,
            "policy": spec.policy,
            "probe_sobel_change": image.probe.sobel_change if image.probe else None,
            "probe_fft_high_frequency_ratio": image.probe.fft_high_frequency_ratio if image.probe else None,
            "strategy_scores": None if image.strategy_scores is None else dict(image.strategy_scores),
            "cfg": list(request.cfg),
            "tau": list(request.tau),
            "top_k": request.top_k,
            "top_p": request.top_p,
            "aspect_ratio": request.aspect_ratio,
            "scales_run": image.scales_run,
            "cost_share": image.cost_share,
            "audit_ssim": image.audit_ssim,
            "model": spec.model,
            "fingerprint": spec.fingerprint,
            "unit": self._unit.index,
            "replica": self._replica,
            "created_at": datetime.now(UTC),
            "engine_seconds": image.engine_seconds,
            **({} if image.trial is None else trial_to_columns(image.trial)),
            **self._own(request.columns),
        }

    def _error_row(self, failure: Failure) -> dict[str, Any]:
        return {
            "position": failure.position,
            "image_index": failure.image_index,
            "id": failure.id,
            "unit": self._unit.index,
            "seed": failure.seed,
            "prompt": failure.prompt,
            "error_class": failure.error_class,
            "message": failure.message.encode("utf-8", "replace").decode(),
            "attempts": failure.attempts + self._unit.retry,
            **self._own(failure.columns),
        }

    def _own(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        return {stored: columns.get(name) for name, stored in self._names.items()}

    def _publish_errors(self) -> str:
        """Write the error file under the first free attempt number: one of a dead run may have been left behind."""
        rows = (self._error_row(self._failures[key]) for key in sorted(self._failures))
        file = UnitFile(error_schema(self._spec.columns), rows, self._spec.form.max_row_group_bytes)
        data = file.finish({"skipvar.unit": str(self._unit.index), "skipvar.fingerprint": self._spec.fingerprint})
        attempt = max(1, self._attempt)
        while not self._storage.put_if_absent(error_name(self._unit.index, attempt), data):
            attempt += 1
        return error_name(self._unit.index, attempt)

    def _data_file(self, errors: str | None) -> tuple[bytes, UnitFooter]:
        keys = sorted(self._rows)
        rows = (self._rows.pop(key) for key in keys)
        schema = dataset_schema(self._spec.columns, self._spec.policy)
        file = UnitFile(schema, rows, self._spec.form.max_row_group_bytes)
        footer = UnitFooter(
            unit=self._unit.index,
            retry=self._unit.retry,
            rows=len(keys),
            content_hash=file.content_hash,
            fingerprint=self._spec.fingerprint,
            errors=errors,
            error_rows=len(self._failures),
            retried=self._unit.only if self._unit.retry else None,
            phase_seconds=_rounded(self._phase_seconds),
            audit_seconds=_rounded(self._audit_seconds),
        )
        return file.finish(footer.to_metadata()), footer

    def _published(self, name: str) -> UnitFooter:
        footer = read_unit_footer(self._storage, name)
        if footer.fingerprint != self._spec.fingerprint:
            raise StorageError(
                f"{self._storage.uri}/{name} belongs to a run with fingerprint {footer.fingerprint}, not "
                f"{self._spec.fingerprint}; give each run an output of its own."
            )
        return footer


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    """To microseconds."""
    return {name: round(value, 6) for name, value in sorted(seconds.items())}
