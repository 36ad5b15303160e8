"""Whether a dataset is whole: every request exactly once, every file as published. And what to make again if not."""

import hashlib
import io
import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
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
    list_units,
    parse_data_name,
    parse_error_name,
    read_columns,
    read_table,
    read_unit_footer,
)
from skipvar.types import RequestKey

logger = logging.getLogger(__name__)

_THREADS = 4
_SAMPLED_IMAGES = 2
"""Images decoded of each file where not all are."""
_MAX_NAMED = 20


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


@dataclass
class _UnitCheck:
    unit: int
    problems: list[str] = field(default_factory=list)
    images: set[RequestKey] = field(default_factory=set)
    errors: set[RequestKey] = field(default_factory=set)
    """Error rows that count."""
    error_files: set[str] = field(default_factory=set)
    ids: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    """By position, over all files of the unit; they become `id_hashes`."""
    id_hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))


def verify(storage: Storage, *, full: bool = False) -> Verdict:
    """Check everything that was published; with `full`, decode every image and not only a sample."""
    verdict = Verdict()
    record = Ledger(storage).read_run()
    if record is None:
        verdict.problems.append(f"{storage.uri} has no {RUN_FILE}: it is no output of a run.")
        return verdict
    verdict.num_requests = record.input.num_requests
    retries, strangers = list_units(storage, record.input.num_units)
    if strangers:
        verdict.problems.append(f"{_names(strangers)} under {DATA} belong to no unit of this run; remove them.")
    missing = [unit for unit in range(record.input.num_units) if 0 not in retries.get(unit, [])]
    if missing:
        verdict.problems.append(f"{_units(missing)} not published (the run's state is '{record.state}').")
    checker = _Checker(storage, record, full)
    present = sorted(unit for unit in retries if 0 in retries[unit])
    referenced: set[str] = set()
    damaged: list[int] = []
    hashes: list[tuple[int, np.ndarray]] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for check in pool.map(lambda unit: checker.check(unit, sorted(retries[unit])), present):
            verdict.problems += check.problems
            verdict.num_images += len(check.images)
            verdict.num_errors += len(check.errors)
            referenced |= check.error_files
            if check.problems:
                damaged.append(check.unit)
            else:
                hashes.append((check.unit, check.id_hashes))
    verdict.units_to_make = sorted({*missing, *damaged})
    _note_orphans(storage, referenced, verdict)
    _note_repeated_ids(storage, hashes, retries, verdict)
    if not verdict.problems and not storage.exists(SUCCESS_FILE):
        verdict.problems.append(f"All units are there but {SUCCESS_FILE} is not; run the same command again to finish.")
    return verdict


def unpublish(storage: Storage, units: Iterable[int]) -> list[str]:
    """Remove the data files of these units, so that the next run makes them again. Returns the names removed."""
    wanted = set(units)
    names = [
        entry.name
        for entry in storage.list(DATA)
        if (parsed := parse_data_name(entry.name)) is not None and parsed[0] in wanted
    ]
    storage.delete(SUCCESS_FILE)  # first: from here on the dataset is not whole
    for name in names:
        storage.delete(name)
    return names


class _Checker:
    """Checks single units against the run's record."""

    def __init__(self, storage: Storage, record: RunRecord, full: bool) -> None:
        self._storage = storage
        self._input = record.input
        self._fingerprint = record.fingerprint
        self._is_full = full
        own = own_names(list(record.input.columns))
        standard = {column.name: _type_name(column.type) for column in dataset_schema(pa.schema([]), record.policy)}
        self._columns = {**standard, **{own[name]: kind for name, kind in record.input.columns.items()}}

    def check(self, unit: int, retries: Sequence[int]) -> _UnitCheck:
        """Check the files of a unit and that they account for every request of it once."""
        check = _UnitCheck(unit)
        for retry in retries:
            try:
                self._check_file(data_name(unit, retry), retry, check)
            except (StorageError, pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
                check.problems.append(f"{data_name(unit, retry)} cannot be read: {first_line(error)}.")
        if not check.problems:
            self._check_keys(check)
        found = [_id_hash(id) for of_position in check.ids.values() for id in of_position]
        check.id_hashes = np.array(found, np.uint64)
        check.ids.clear()
        return check

    def _check_file(self, name: str, retry: int, check: _UnitCheck) -> None:
        data = self._storage.read(name)
        footer = read_unit_footer(io.BytesIO(data), name)
        expected = (check.unit, retry, self._fingerprint, SCHEMA_VERSION)
        found = (footer.unit, footer.retry, footer.fingerprint, footer.schema_version)
        if found != expected:
            check.problems.append(
                f"{name}: its footer says unit, retry, fingerprint, schema version {found}; expected are {expected}."
            )
            return
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            columns = {column.name: _type_name(column.type) for column in file.schema_arrow}
            if columns != self._columns:
                differing = sorted(key for key, _ in columns.items() ^ self._columns.items())
                check.problems.append(f"{name}: the columns {', '.join(dict.fromkeys(differing))} are not as planned.")
                return
            keys = self._check_rows(file, footer, name, check)
        if twice := check.images & set(keys):
            check.problems.append(f"{name}: request {min(twice)} has an image in another file of the unit too.")
        check.images.update(keys)
        check.errors -= footer.retried or set()
        check.errors |= self._error_keys(footer, name, check)
        self._check_bytes(name, data, check)

    def _check_bytes(self, name: str, data: bytes, check: _UnitCheck) -> None:
        """What no other check looks at: statistics, indexes, the columns of error rows."""
        if not check.problems and has_own_checksum(data) is False:
            check.problems.append(f"{name} is not as it was published: its bytes do not give the checksum it holds.")

    def _check_rows(self, file: pq.ParquetFile, footer: UnitFooter, name: str, check: _UnitCheck) -> list[RequestKey]:
        content = ContentHash()
        keys: list[RequestKey] = []
        for group in range(file.num_row_groups):
            for batch in file.read_row_group(group, use_threads=False).to_batches():
                content.update(batch)
                self._check_images(batch, name, check, sample=0 if self._is_full else _SAMPLED_IMAGES)
                table = batch.select(["position", "image_index", "id", "unit", "fingerprint"])
                for position, index, id, unit, fingerprint in zip(
                    *(column.to_pylist() for column in table.columns), strict=True
                ):
                    keys.append((position, index))
                    check.ids[position].add(id)
                    if (unit, fingerprint) != (check.unit, self._fingerprint):
                        check.problems.append(f"{name}: request {keys[-1]} bears another unit or fingerprint.")
        if len(keys) != footer.rows:
            check.problems.append(f"{name} has {len(keys)} rows; its footer says {footer.rows}.")
        if content.hexdigest() != footer.content_hash:
            check.problems.append(f"{name}: the content does not have the hash that its footer says.")
        if any(first >= second for first, second in itertools.pairwise(keys)):
            check.problems.append(f"{name}: its rows are not sorted, or a request stands twice.")
        return keys

    def _check_images(self, batch: pa.RecordBatch, name: str, check: _UnitCheck, sample: int) -> None:
        """Decode images; with `sample` > 0 only so many, spread evenly."""
        count = batch.num_rows
        chosen = range(count) if not sample else sorted({at * count // sample for at in range(min(sample, count))})
        for at in chosen:
            row = {
                key: batch.column(key)[at].as_py() for key in ("position", "image_index", "image", "width", "height")
            }
            where = f"{name}: the image of request {(row['position'], row['image_index'])}"
            try:
                pixels = decode_image(row["image"]["bytes"])
            except (OSError, ValueError, TypeError, SyntaxError) as error:
                check.problems.append(f"{where} cannot be decoded: {first_line(error)}.")
                continue
            if pixels.shape[:2] != (row["height"], row["width"]):
                check.problems.append(f"{where} is not {row['width']} x {row['height']} as its row says.")

    def _error_keys(self, footer: UnitFooter, name: str, check: _UnitCheck) -> set[RequestKey]:
        if footer.errors is None:
            return set()
        check.error_files.add(footer.errors)
        data = self._storage.read(footer.errors)
        self._check_bytes(footer.errors, data, check)
        table = read_table(data, ["position", "image_index"])
        keys = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
        if len(keys) != footer.error_rows or len(set(keys)) != len(keys):
            check.problems.append(f"{footer.errors} does not have the {footer.error_rows} rows that {name} counts.")
        return set(keys)

    def _check_keys(self, check: _UnitCheck) -> None:
        expected = set(self._input.unit(check.unit).keys(self._input.images_per_prompt))
        for keys, what in (
            (expected - check.images - check.errors, "are in neither data nor errors"),
            (check.images & check.errors, "are in both data and errors"),
            ((check.images | check.errors) - expected, "do not belong to the unit"),
        ):
            if keys:
                check.problems.append(f"unit {check.unit}: {len(keys)} requests, such as {min(keys)}, {what}.")


def _note_orphans(storage: Storage, referenced: set[str], verdict: Verdict) -> None:
    orphans = [entry.name for entry in storage.list(ERRORS) if entry.name not in referenced]
    if orphans:
        known = sum(parse_error_name(name) is not None for name in orphans)
        verdict.notes.append(f"{_names(orphans)} count for nothing ({known} of attempts that did not publish).")


def _note_repeated_ids(
    storage: Storage, hashes: Sequence[tuple[int, np.ndarray]], retries: dict[int, list[int]], verdict: Verdict
) -> None:
    """Name ids that stand at several positions. Eight bytes a row are held; the names are read again."""
    everything = np.sort(np.concatenate([np.empty(0, np.uint64), *(found for _, found in hashes)]))
    repeated = np.unique(everything[1:][everything[1:] == everything[:-1]])
    if not repeated.size:
        return
    counts: Counter[str] = Counter()
    for unit, found in hashes:
        if len(counts) >= _MAX_NAMED:
            break
        if np.isin(found, repeated).any():
            for retry in retries[unit]:
                ids = read_columns(storage, data_name(unit, retry), ["id"]).column("id").to_pylist()
                counts.update(id for id in dict.fromkeys(ids) if np.uint64(_id_hash(id)) in repeated)
    shown = ", ".join(repr(id) for id in list(counts)[:_MAX_NAMED])
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
