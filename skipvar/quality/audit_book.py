"""`audit.state`: what audits have counted over all nights, each published file of each run once, and the alarm.

A folder (or prefix) of small objects, all written by put-if-absent:

    <fingerprint>/<number of files counted>.json     what one run has counted; the highest number holds
    alarm.json                                       the first alarm; nothing here ever removes it

A count is never added to: it is worked out from a run's data files, which never change once they are published, in the
order of their units, and published under the number of files that it holds. A process that is killed before has
counted nothing, and the next one reads the same files again; one that is killed after has counted them. Two processes
with one run write the same counts; a late one cannot lower the highest number. Runs only share the sum of their counts.
Unit order, not that of publication: images that are made faster were skipped more, and would be counted first.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from skipvar.errors import ConfigError, NotFoundError, StorageError
from skipvar.quality.audit import wealth
from skipvar.shards.record import now
from skipvar.shards.storage import Storage
from skipvar.shards.unitfile import FileKey, data_files, read_columns
from skipvar.skip.policy import Promise

logger = logging.getLogger(__name__)

ALARM = "alarm.json"
_COUNT = re.compile(r"[^/]+/\d{9}\.json")
_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class RunCount:
    """What one run has counted so far."""

    units: int = 0
    """All units below this one are counted,"""
    retries: tuple[FileKey, ...] = ()
    """and these retries, which come after all units."""
    images: int = 0
    misses: int = 0
    """Audited images under the floor."""

    @property
    def num_files(self) -> int:
        """Data files that are counted, retries included: the count is published under this number."""
        return self.units + len(self.retries)

    def holds(self, file: FileKey) -> bool:
        """Whether a file is counted already."""
        return file in self.retries if file[1] else file[0] < self.units

    def plus(self, file: FileKey, images: int, misses: int) -> "RunCount":
        """The count with one more file: the next unit in order, or a retry."""
        more = {"retries": (*self.retries, file)} if file[1] else {"units": self.units + 1}
        return replace(self, **more, images=self.images + images, misses=self.misses + misses)


@dataclass(frozen=True, kw_only=True)
class AuditAlarm:
    """The wealth reached 1 / delta: the promise does not hold."""

    images: int
    """Audited images of all runs by then."""
    misses: int
    wealth: float
    fingerprint: str
    """Of the run that raised it,"""
    unit: int
    """after this unit."""
    raised_at: str

    def text(self, promise: Promise) -> str:
        """For a person, in one line: how many images missed the floor, and what `promise` allows."""
        return (
            f"Audit alarm: {self.misses} of {self.images} audited images have an SSIM under {promise.floor:g}, where "
            f"at most {100 * promise.alpha:g}% were promised (wealth {self.wealth:.3g}, the alarm is at "
            f"{1 / promise.delta:g}; run {self.fingerprint}, unit {self.unit})"
        )


class AuditBook:
    """The audits of one run and of those that share its state. Used by one thread."""

    def __init__(
        self, storage: Storage, promise: Promise, subject: Mapping[str, Any], fingerprint: str, num_units: int
    ) -> None:
        """`subject`: what the promise is about (policy, model), by the names that a refusal shows the user.

        Raises `ConfigError` where the state counts for another promise.
        """
        self.promise = promise
        self._storage, self._fingerprint, self._num_units = storage, fingerprint, num_units
        self._about = json.loads(json.dumps({**asdict(promise), **subject}))
        self._waiting: dict[FileKey, tuple[int, int]] = {}
        """Published files that are not counted: images, misses."""
        counts = self._read_counts()
        self._own = counts.pop(fingerprint, RunCount())
        self._num_runs = len(counts) + 1
        self._others = (sum(count.images for count in counts.values()), sum(count.misses for count in counts.values()))
        self.alarm = self._read_alarm()
        self._raise_if_due(self._own)

    def catch_up(self, data: Storage) -> None:
        """Take in the run's published files that are not counted yet: those of a session that was killed."""
        missing = [
            (file, name) for file, name in data_files(data) if not self._own.holds(file) and file not in self._waiting
        ]
        with ThreadPoolExecutor(_THREADS) as pool:
            scores = pool.map(lambda item: read_audit_scores(data, item[1]), missing)
            for (file, _), of_file in zip(missing, scores, strict=True):
                self.add(file, of_file)

    def add(self, file: FileKey, scores: Iterable[float]) -> None:
        """A file was published; `scores` are the SSIM of its audited images. It counts once all before it do."""
        if not self._own.holds(file):
            values = list(scores)
            self._waiting[file] = (len(values), sum(value < self.promise.floor for value in values))

    def count(self) -> AuditAlarm | None:
        """Count for good what is next in order; returns the alarm that stands, if any. Raises `StorageError`."""
        while (counted := self._counted()) != self._own:
            content = json.dumps({**asdict(counted), "about": self._about}).encode()
            if self._storage.put_if_absent(self._name(counted), content):
                before, self._own = self._own, counted
                if before.num_files:
                    self._storage.delete(self._name(before))
            else:  # another process with this run was faster
                self._own = self._read_counts()[self._fingerprint]
            self._waiting = {file: found for file, found in self._waiting.items() if not self._own.holds(file)}
        return self.alarm

    def to_dict(self) -> dict[str, Any]:
        """For `_run.json`: counts of all runs with this state, and the alarm."""
        images, misses = self._totals(self._own)
        return {
            "state": self._storage.uri,
            "promise": asdict(self.promise),
            "runs": self._num_runs,
            "images": images,
            "misses": misses,
            "wealth": round(wealth(images, misses, self.promise.alpha), 4),
            "alarm": None if self.alarm is None else asdict(self.alarm),
        }

    def _counted(self) -> RunCount:
        """The count with all that is next in order. The alarm is published before the count that raises it: whoever is
        killed in between comes by it again."""
        counted = self._own
        while (file := self._next(counted)) is not None:
            counted = counted.plus(file, *self._waiting[file])
            self._raise_if_due(counted, file[0])
        return counted

    def _next(self, counted: RunCount) -> FileKey | None:
        """The file that comes next in order, if it is there: units, then retries."""
        if counted.units < self._num_units:
            unit = (counted.units, 0)
            return unit if unit in self._waiting else None
        return min((file for file in self._waiting if file[1] and not counted.holds(file)), default=None)

    def _totals(self, own: RunCount) -> tuple[int, int]:
        return self._others[0] + own.images, self._others[1] + own.misses

    def _raise_if_due(self, own: RunCount, unit: int = 0) -> None:
        images, misses = self._totals(own)
        found = wealth(images, misses, self.promise.alpha)
        if self.alarm is not None or found < 1 / self.promise.delta:
            return
        alarm = AuditAlarm(
            images=images,
            misses=misses,
            wealth=round(found, 4),
            fingerprint=self._fingerprint,
            unit=unit,
            raised_at=now(),
        )
        self._storage.put_if_absent(ALARM, json.dumps(asdict(alarm)).encode())
        self.alarm = self._read_alarm()

    def _name(self, count: RunCount) -> str:
        return f"{self._fingerprint}/{count.num_files:09d}.json"

    def _read_alarm(self) -> AuditAlarm | None:
        try:
            return AuditAlarm(**json.loads(self._storage.read(ALARM)))
        except NotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise self._damaged(ALARM) from error

    def _read_counts(self) -> dict[str, RunCount]:
        """The highest count of each run."""
        names = (entry.name for entry in self._storage.list())  # whoever tries whether it can write here has one, too
        highest = {name.partition("/")[0]: name for name in names if _COUNT.fullmatch(name)}  # in the order of names
        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(zip(highest, pool.map(self._read_count, highest.values()), strict=True))

    def _read_count(self, name: str) -> RunCount:
        try:
            content = json.loads(self._storage.read(name))
            about = content.pop("about")
            retries = tuple((unit, retry) for unit, retry in content.pop("retries"))
            count = RunCount(**content, retries=retries)
        except NotFoundError:  # a higher one took its place just now
            return self._read_counts()[name.partition("/")[0]]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._damaged(name) from error
        if about != self._about:
            changed = [
                f"{key}: {about.get(key)} -> {self._about.get(key)}"
                for key in dict.fromkeys([*about, *self._about])
                if about.get(key) != self._about.get(key)
            ]
            raise ConfigError(
                f"audit.state {self._storage.uri} counts the audits of another promise ({'; '.join(changed)}): "
                "go back to that, or give another audit.state."
            )
        return count

    def _damaged(self, name: str) -> StorageError:
        return StorageError(f"{self._storage.uri}/{name} is no part of an audit.state; give another audit.state.")


def read_audit_scores(data: Storage, name: str) -> list[float]:
    """The SSIM of the audited images of a data file; no other column is read."""
    return read_columns(data, name, ["audit_ssim"])["audit_ssim"].drop_null().to_pylist()
