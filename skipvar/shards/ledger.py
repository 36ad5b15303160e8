"""What an output tells of its run: what it is (`_run.json`), which units are done, what failed, how it ended."""

import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from skipvar.errors import ConfigError, NotFoundError, StorageError
from skipvar.shards.card import dataset_card
from skipvar.shards.prompts import Plan
from skipvar.shards.record import RunRecord, State, json_file, now
from skipvar.shards.storage import Storage
from skipvar.shards.textinput import INPUT
from skipvar.shards.unitfile import (
    DATA,
    ERRORS,
    data_files,
    data_name,
    parse_error_name,
    read_columns,
    read_unit_footer,
    unit_files,
)
from skipvar.types import RequestKey, Unit

logger = logging.getLogger(__name__)

RUN_FILE = "_run.json"
SUCCESS_FILE = "_SUCCESS"
CARD_FILE = "README.md"
LOG = "_log/"
_FOOTER_THREADS = 16
_ERROR_COLUMNS = ("position", "image_index", "error_class", "message")


@dataclass(frozen=True)
class FailedUnit:
    """A unit with error rows that count."""

    unit: int
    rows: Mapping[RequestKey, Mapping[str, Any]]
    """`error_class` and `message` of each request that has no image yet."""
    next_retry: int

    @property
    def keys(self) -> frozenset[RequestKey]:
        """Those requests."""
        return frozenset(self.rows)


class Ledger:
    """The books of one output. Every trouble with the storage is a `StorageError`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def read_run(self) -> RunRecord | None:
        """The record of the run in this output; None if there is none."""
        try:
            return RunRecord.from_json(self._storage.read(RUN_FILE))
        except NotFoundError:
            return None
        except ValueError as error:
            raise StorageError(f"{self._storage.uri}/{RUN_FILE} is {error}; give another output.") from error

    def open_run(self, record: RunRecord) -> tuple[RunRecord, RunRecord | None]:
        """Begin a run in this output, or go on with the one that is there. Its record, and the one that was found
        (None: the run is new).

        A `ConfigError` lists what differs from the run that is there and says what to do.
        """
        present = self.read_run()
        if present is None:
            if next(self._storage.list(DATA), None) is not None:
                raise ConfigError(
                    f"{self._storage.uri} has a data/ folder but no {RUN_FILE}: it is no output of a run; "
                    "give another one."
                )
            if self._storage.put_if_absent(RUN_FILE, record.to_json()):
                return record, None
            present = self.read_run()  # another run began at the same moment
        assert present is not None
        self._refuse_differences(present, record)
        began, goes_on = present.versions.get("torch"), record.versions.get("torch")
        if began != goes_on:
            logger.warning(
                "this run began with torch %s and goes on with %s: pixels may round otherwise", began, goes_on
            )
        resumed = replace(present, state="running", resumed_at=now(), ended_at=None)
        self._storage.replace(RUN_FILE, resumed.to_json())
        return resumed, present

    def withdraw(self, found: RunRecord | None) -> None:
        """Forget a session that published nothing: its run is as it was `found`.

        One that was not there before goes, unless it published: its input, its logs, and last of all its record.
        """
        if found is not None:
            self._storage.replace(RUN_FILE, found.to_json())
        elif next(self._storage.list(DATA), None) is None:
            for prefix in (INPUT, LOG):
                for entry in list(self._storage.list(prefix)):
                    self._storage.delete(entry.name)
            self._storage.delete(RUN_FILE)

    def is_finished(self) -> bool:
        """Whether a run ended here with a whole dataset: `_SUCCESS` is there."""
        try:
            self._storage.read(SUCCESS_FILE)
        except NotFoundError:
            return False
        return True

    def unpublish(self, units: Iterable[int]) -> list[str]:
        """Remove the data files of these units, so that the next run makes them again. Returns the names removed."""
        wanted = set(units)
        names = [name for (unit, _), name in data_files(self._storage) if unit in wanted]
        self._storage.delete(SUCCESS_FILE)  # first: from here on the dataset is not whole
        for name in names:
            self._storage.delete(name)
        return names

    def done_units(self) -> set[int]:
        """The units that are published, by one listing of `data/`."""
        return {unit for (unit, retry), _ in data_files(self._storage) if retry == 0}

    def failed_requests(self) -> Iterator[FailedUnit]:
        """The units with error rows that count, with these rows' requests.

        Lists `data/` and `errors/` once; reads the footers and error files of the units that have any.
        """
        suspects = {parsed[0] for entry in self._storage.list(ERRORS) if (parsed := parse_error_name(entry.name))}
        retries = unit_files(self._storage, suspects)
        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            for failed in pool.map(self._failed_unit, retries, retries.values()):
                if failed.rows:
                    yield failed

    def retry_units(self, plan: Plan) -> Iterator[Unit]:
        """The units to hand out for `retry_errors`: only the requests that failed, published beside the unit."""
        for failed in self.failed_requests():
            yield replace(plan.unit(failed.unit), only=failed.keys, retry=failed.next_retry)

    def num_errors(self) -> int:
        """The error rows that count."""
        return sum(len(failed.rows) for failed in self.failed_requests())

    def finish(self, state: State, counts: Mapping[str, Any]) -> None:
        """Record how the run ended; at a whole dataset also the card and, last of all, `_SUCCESS`."""
        record = self.read_run()
        if record is None:
            raise StorageError(
                f"{self._storage.uri}/{RUN_FILE} vanished during the run; look at who else uses this output."
            )
        record = replace(record, state=state, counts=counts, ended_at=now())
        is_whole = state in ("finished", "finished_with_errors")
        if is_whole:
            self._storage.replace(CARD_FILE, dataset_card(record).encode())
        self._storage.replace(RUN_FILE, record.to_json())
        if is_whole:
            self._storage.replace(SUCCESS_FILE, json_file({"state": state, "counts": counts}))

    def _failed_unit(self, unit: int, retries: list[int]) -> FailedUnit:
        rows: dict[RequestKey, dict[str, Any]] = {}
        for retry in retries:
            footer = read_unit_footer(self._storage, data_name(unit, retry))
            for key in footer.retried or ():
                rows.pop(key, None)
            if footer.errors is not None:
                found = read_columns(self._storage, footer.errors, _ERROR_COLUMNS).to_pylist()
                rows |= {(row["position"], row["image_index"]): row for row in found}
        return FailedUnit(unit, rows, retries[-1] + 1)

    def _refuse_differences(self, present: RunRecord, record: RunRecord) -> None:
        old, new = (
            {**each.parts, "input": asdict(each.input), "schema_version": each.schema_version}
            for each in (present, record)
        )
        changes = list(_differences(_plain(old), _plain(new)))
        if changes:
            raise ConfigError(
                f"{self._storage.uri} holds a run that was made otherwise: {'; '.join(changes[:20])}. "
                "Go back to the old values to resume it, or give another output.path for the new ones."
            )


def _differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """`key: old -> new` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
    elif isinstance(old, list) and isinstance(new, list) and any(isinstance(item, dict) for item in [*old, *new]):
        for at, pair in enumerate(itertools.zip_longest(old, new)):
            name = next((item["name"] for item in pair if isinstance(item, dict) and "name" in item), at)
            yield from _differences(*pair, f"{key}[{name}]")
    elif old != new:
        yield f"{key}: {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    text = "(none)" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _plain(value: Any) -> Any:
    """The value as it comes back from JSON, so that comparisons see no difference between a tuple and a list."""
    return json.loads(json.dumps(value))
