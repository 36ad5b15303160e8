"""Whether a dataset is whole: every request exactly once, every file as published. And what to make again if not."""

import hashlib
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from skipvar.errors import StorageError, first_line
from skipvar.shards.encode import decode_image
from skipvar.shards.ledger import RUN_FILE, SUCCESS_FILE, Ledger
from skipvar.shards.record import RunRecord
from skipvar.shards.schema import SCHEMA_VERSION, dataset_schema, own_names
from skipvar.shards.storage import Storage
from skipvar.shards.unitfile import (
    DATA,
    ERRORS,
    ContentHash,
    UnitFooter,
    data_name,
    has_own_checksum,
    parse_data_name,
    parse_error_name,
    read_columns,
    read_table,
    readable,
    unit_files,
)
from skipvar.types import RequestKey

logger = logging.getLogger(__name__)

_THREADS = 4
_SAMPLED_IMAGES = 2
"""Images decoded of each file where not all are."""
_MAX_NAMED = 20
_KEY_COLUMNS = ("position", "image_index")


@dataclass
class Verdict:
    """What was found. The dataset is whole if there are no problems."""

    num_requests: int = 0
    num_images: int = 0
    num_errors: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is worth knowing but does not make the dataset less whole: orphans, repeated ids."""
    units_to_make: list[int] = field(default_factory=list)
    """Units that are missing or damaged."""

    @property
    def is_whole(self) -> bool:
        """Whether there are no problems; notes do not count."""
        return not self.problems


def verify(storage: Storage, *, full: bool = False) -> Verdict:
    """Check everything that was published; with `full`, decode every image and not only a sample."""
    verdict = Verdict()
    ledger = Ledger(storage)
    record = ledger.read_run()
    if record is None:
        verdict.problems.append(f"{storage.uri} has no {RUN_FILE}: it is no output of a run.")
        return verdict
    verdict.num_requests = record.input.num_requests
    units = range(record.input.num_units)
    retries = unit_files(storage, units)
    if strangers := [entry.name for entry in storage.list(DATA) if not _is_of(entry.name, units)]:
        verdict.problems.append(f"{_names(strangers)} under {DATA} belong to no unit of this run; remove them.")
    missing = [unit for unit in units if 0 not in retries.get(unit, [])]
    if missing:
        verdict.problems.append(f"{_units(missing)} not published (the run's state is '{record.state}').")
    run = _Run(storage, record, _planned_columns(record), full)
    present = [unit for unit in retries if 0 in retries[unit]]
    error_files: set[str] = set()
    id_hashes: dict[int, np.ndarray] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for check in pool.map(lambda unit: _check(run, unit, retries[unit]), present):
            verdict.problems += check.problems
            verdict.num_images += len(check.images)
            verdict.num_errors += len(check.errors)
            error_files |= check.error_files
            if not check.problems:
                id_hashes[check.unit] = check.id_hashes()
    verdict.units_to_make = sorted({*missing, *present} - id_hashes.keys())
    _note_orphans(storage, error_files, verdict)
    _note_repeated_ids(storage, id_hashes, retries, verdict)
    if not verdict.problems and not ledger.is_finished():
        verdict.problems.append(f"All units are there but {SUCCESS_FILE} is not; run the same command again to finish.")
    return verdict


@dataclass(frozen=True)
class _Run:
    """What all units are checked against."""

    storage: Storage
    record: RunRecord
    columns: Mapping[str, str]
    """The type of each column that the data files must have."""
    is_full: bool
    """Whether all images are decoded."""


@dataclass
class _UnitCheck:
    """What was found of one unit."""

    run: _Run
    unit: int
    problems: list[str] = field(default_factory=list)
    images: set[RequestKey] = field(default_factory=set)
    errors: set[RequestKey] = field(default_factory=set)
    """Error rows that count."""
    error_files: set[str] = field(default_factory=set)
    ids: set[tuple[int, str]] = field(default_factory=set)
    """Each position with its id, over all files of the unit."""

    def id_hashes(self) -> np.ndarray:
        """`(positions,)` uint64."""
        return np.array([_id_hash(id) for _, id in self.ids], np.uint64)

    def check_file(self, retry: int) -> None:
        """One data file of the unit, and the error file that it names."""
        name = data_name(self.unit, retry)
        data = self.run.storage.read(name)
        with readable(name):
            footer = UnitFooter.from_metadata(pq.read_metadata(pa.BufferReader(data)).metadata or {})
        expected = (self.unit, retry, self.run.record.fingerprint, SCHEMA_VERSION)
        found = (footer.unit, footer.retry, footer.fingerprint, footer.schema_version)
        if found != expected:
            self.problems.append(
                f"{name}: its footer says unit, retry, fingerprint, schema version {found}; expected are {expected}."
            )
            return
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            columns = {column.name: _type_name(column.type) for column in file.schema_arrow}
            if columns != self.run.columns:
                differing = sorted(key for key, _ in columns.items() ^ self.run.columns.items())
                self.problems.append(f"{name}: the columns {', '.join(dict.fromkeys(differing))} are not as planned.")
                return
            keys = self._check_rows(file, footer, name)
        if twice := self.images & set(keys):
            self.problems.append(f"{name}: request {min(twice)} has an image in another file of the unit too.")
        self.images.update(keys)
        self.errors -= footer.retried or set()
        if footer.errors is not None:
            self.errors |= self._check_errors(footer.errors, footer.error_rows, name)
        self._check_bytes(name, data)

    def check_keys(self) -> None:
        """Whether the files account for every request of the unit once."""
        planned = self.run.record.input
        expected = set(planned.unit(self.unit).keys(planned.images_per_prompt))
        for keys, what in (
            (expected - self.images - self.errors, "are in neither data nor errors"),
            (self.images & self.errors, "are in both data and errors"),
            ((self.images | self.errors) - expected, "do not belong to the unit"),
        ):
            if keys:
                self.problems.append(f"unit {self.unit}: {len(keys)} requests, such as {min(keys)}, {what}.")

    def _check_bytes(self, name: str, data: bytes) -> None:
        """What no other check looks at: statistics, indexes, the columns of error rows."""
        if not self.problems and has_own_checksum(data) is False:
            self.problems.append(f"{name} is not as it was published: its bytes do not give the checksum it holds.")

    def _check_rows(self, file: pq.ParquetFile, footer: UnitFooter, name: str) -> list[RequestKey]:
        content = ContentHash()
        keys: list[RequestKey] = []
        for group in range(file.num_row_groups):
            for batch in file.read_row_group(group, use_threads=False).to_batches():
                content.update(batch)
                self._check_images(batch, name)
                for row in batch.select(["position", "image_index", "id", "unit", "fingerprint"]).to_pylist():
                    keys.append((row["position"], row["image_index"]))
                    self.ids.add((row["position"], row["id"]))
                    if (row["unit"], row["fingerprint"]) != (self.unit, footer.fingerprint):
                        self.problems.append(f"{name}: request {keys[-1]} bears another unit or fingerprint.")
        if len(keys) != footer.rows:
            self.problems.append(f"{name} has {len(keys)} rows; its footer says {footer.rows}.")
        if content.hexdigest() != footer.content_hash:
            self.problems.append(f"{name}: the content does not have the hash that its footer says.")
        if any(first >= second for first, second in itertools.pairwise(keys)):
            self.problems.append(f"{name}: its rows are not sorted, or a request stands twice.")
        return keys

    def _check_images(self, batch: pa.RecordBatch, name: str) -> None:
        """Decode images: all, or a sample that is spread evenly."""
        count = batch.num_rows
        sample = count if self.run.is_full else min(_SAMPLED_IMAGES, count)
        columns = batch.select(["position", "image_index", "image", "width", "height"])
        for at in range(sample):
            [row] = columns.slice(at * count // sample, 1).to_pylist()
            where = f"{name}: the image of request {(row['position'], row['image_index'])}"
            try:
                pixels = decode_image(row["image"]["bytes"])
            except (OSError, ValueError, TypeError, SyntaxError) as error:
                self.problems.append(f"{where} cannot be decoded: {first_line(error)}.")
                continue
            if pixels.shape[:2] != (row["height"], row["width"]):
                self.problems.append(f"{where} is not {row['width']} x {row['height']} as its row says.")

    def _check_errors(self, name: str, num_rows: int, data_name: str) -> set[RequestKey]:
        self.error_files.add(name)
        data = self.run.storage.read(name)
        self._check_bytes(name, data)
        keys = [(row["position"], row["image_index"]) for row in read_table(data, _KEY_COLUMNS).to_pylist()]
        if len(keys) != num_rows or len(set(keys)) != len(keys):
            self.problems.append(f"{name} does not have the {num_rows} rows that {data_name} counts.")
        return set(keys)


def _check(run: _Run, unit: int, retries: Iterable[int]) -> _UnitCheck:
    """Check the files of a unit and that they account for every request of it once."""
    check = _UnitCheck(run, unit)
    for retry in retries:
        try:
            check.check_file(retry)
        except (StorageError, pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            check.problems.append(f"{data_name(unit, retry)} cannot be read: {first_line(error)}.")
    if not check.problems:
        check.check_keys()
    return check


def _planned_columns(record: RunRecord) -> dict[str, str]:
    own = own_names(list(record.input.columns))
    standard = {column.name: _type_name(column.type) for column in dataset_schema(pa.schema([]), record.policy)}
    return {**standard, **{own[name]: kind for name, kind in record.input.columns.items()}}


def _is_of(name: str, units: range) -> bool:
    key = parse_data_name(name)
    return key is not None and key[0] in units


def _note_orphans(storage: Storage, referenced: set[str], verdict: Verdict) -> None:
    orphans = [entry.name for entry in storage.list(ERRORS) if entry.name not in referenced]
    if orphans:
        known = sum(parse_error_name(name) is not None for name in orphans)
        verdict.notes.append(f"{_names(orphans)} count for nothing ({known} of attempts that did not publish).")


def _note_repeated_ids(
    storage: Storage, hashes: Mapping[int, np.ndarray], retries: Mapping[int, Sequence[int]], verdict: Verdict
) -> None:
    """Name ids that stand at several positions. Eight bytes a row are held; the names are read again."""
    found, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes.values()]), return_counts=True)
    repeated = found[counts > 1]
    if not repeated.size:
        return
    names: dict[str, None] = {}
    for unit in hashes:
        if len(names) < _MAX_NAMED and np.isin(hashes[unit], repeated).any():
            for retry in retries[unit]:
                ids = read_columns(storage, data_name(unit, retry), ["id"]).column("id").to_pylist()
                names |= dict.fromkeys(id for id in ids if np.uint64(_id_hash(id)) in repeated)
    shown = ", ".join(repr(id) for id in list(names)[:_MAX_NAMED])
    verdict.notes.append(
        f"{repeated.size} ids stand at several positions: {shown}{', ...' if repeated.size > _MAX_NAMED else ''}."
    )


def _type_name(kind: pa.DataType) -> str:
    """Parquet calls a list's child `element`, Arrow `item`."""
    return str(kind).replace("<element: ", "<item: ")


def _id_hash(id: str) -> int:
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little")


def _units(units: Sequence[int]) -> str:
    shown = ", ".join(map(str, units[:_MAX_NAMED])) + (", ..." if len(units) > _MAX_NAMED else "")
    return f"Unit {shown} is" if len(units) == 1 else f"{len(units)} units ({shown}) are"


def _names(names: Sequence[str]) -> str:
    return f"{len(names)} files ({', '.join(names[:_MAX_NAMED])}{', ...' if len(names) > _MAX_NAMED else ''})"
