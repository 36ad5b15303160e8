"""`audit.state`: every published file of every run counts once, in order, whatever is killed; an alarm stands."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from skipvar.errors import ConfigError, StorageError
from skipvar.quality.audit import wealth
from skipvar.quality.audit_book import ALARM, AuditBook
from skipvar.shards.storage import LocalStorage
from skipvar.shards.unitfile import data_name
from skipvar.skip.policy import Promise

PROMISE = Promise(floor=0.84, alpha=0.1, delta=0.05)
SUBJECT = {"policy": {"name": "p"}}


class KilledError(Exception):
    """The process ends here."""


class DeadlyStorage(LocalStorage):
    """Kills the process at random: before or after an object is published or deleted."""

    def __init__(self, uri: str, generator: random.Random, share: float = 0.3) -> None:
        super().__init__(uri)
        self._random, self._share = generator, share

    def _maybe_die(self) -> None:
        if self._random.random() < self._share:
            raise KilledError

    def put_if_absent(self, name: str, data: bytes) -> bool:
        self._maybe_die()
        done = super().put_if_absent(name, data)
        self._maybe_die()
        return done

    def delete(self, name: str) -> None:
        self._maybe_die()
        super().delete(name)
        self._maybe_die()


def publish(output: LocalStorage, unit: int, scores: Sequence[float | None], retry: int = 0) -> None:
    path = Path(output.uri) / data_name(unit, retry)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"audit_ssim": pa.array(scores, pa.float64()), "image": ["x"] * len(scores)}), path)


def book(state: LocalStorage, fingerprint: str = "a", num_units: int = 10, promise: Promise = PROMISE) -> AuditBook:
    return AuditBook(state, promise, SUBJECT, fingerprint, num_units)


def totals(of: AuditBook) -> tuple[int, int]:
    told = of.to_dict()
    return told["images"], told["misses"]


def night(generator: random.Random, num_units: int, share: float) -> list[list[float]]:
    """Scores of each unit's audited images."""
    return [
        [0.5 if generator.random() < share else 0.9 for _ in range(generator.randrange(6))] for _ in range(num_units)
    ]


def first_alarm(nights: Sequence[Sequence[Sequence[float]]]) -> tuple[int, int] | None:
    """Night and unit of the first alarm, all units one after another: what no kill may change."""
    images = misses = 0
    for number, units in enumerate(nights):
        for unit, scores in enumerate(units):
            images, misses = images + len(scores), misses + sum(score < PROMISE.floor for score in scores)
            if wealth(images, misses, PROMISE.alpha) >= 1 / PROMISE.delta:
                return number, unit
    return None


@pytest.mark.parametrize("seed", range(12))
def test_nights_that_are_killed_at_random_count_every_audited_image_once(tmp_path: Path, seed: int) -> None:
    """Three runs share a state. Units are published in any order, the process dies anywhere, and is started again."""
    generator = random.Random(seed)
    state = LocalStorage(str(tmp_path / "state"))
    nights = [night(generator, 15, share=0.05 + 0.1 * (seed % 3)) for _ in range(3)]
    for number, units in enumerate(nights):
        output = LocalStorage(str(tmp_path / f"night-{number}"))
        order = generator.sample(range(15), 15)
        done = 0
        is_over = False
        while not is_over:
            try:
                deadly = DeadlyStorage(state.uri, generator)
                mine = book(deadly, f"night-{number}", 15)
                mine.catch_up(output)
                mine.count()
                while done < 15:
                    publish(output, order[done], units[order[done]])
                    done += 1
                    if generator.random() < 0.2:
                        raise KilledError  # published, and nobody was told
                    mine.add((order[done - 1], 0), units[order[done - 1]])
                    if generator.random() < 0.5:
                        mine.count()
                mine.count()
                is_over = True
            except KilledError:
                continue
    scores = [score for units in nights for unit in units for score in unit]
    found = book(state, "night-0", 15)
    assert totals(found) == (len(scores), sum(score < PROMISE.floor for score in scores))
    expected = first_alarm(nights)
    alarm = found.alarm
    assert (None if alarm is None else (int(alarm.fingerprint[-1]), alarm.unit)) == expected


def test_units_count_in_their_order_and_retries_after_them(tmp_path: Path) -> None:
    state, output = LocalStorage(str(tmp_path / "state")), LocalStorage(str(tmp_path / "out"))
    mine = book(state, num_units=3)
    mine.add((2, 0), [0.9])
    mine.add((0, 1), [0.5])
    mine.count()
    assert totals(mine) == (0, 0) and list(state.list()) == []
    mine.add((0, 0), [0.9, 0.9])
    mine.count()
    assert totals(mine) == (2, 0)
    mine.add((1, 0), [])
    mine.count()
    mine.count()
    assert totals(mine) == (4, 1)
    assert [entry.name for entry in state.list()] == ["a/000000004.json"]
    for unit, retry, scores in [(0, 0, [0.9, 0.9]), (1, 0, []), (2, 0, [0.9]), (0, 1, [0.5]), (0, 2, [0.4, None])]:
        publish(output, unit, scores, retry)
    again = book(state, num_units=3)
    again.catch_up(output)
    again.count()
    assert totals(again) == (5, 2)


def test_a_late_process_lowers_nothing_and_counts_nothing_twice(tmp_path: Path) -> None:
    state = LocalStorage(str(tmp_path))
    late, mine = book(state), book(state)
    for unit in range(3):
        mine.add((unit, 0), [0.9])
        mine.count()
    late.add((0, 0), [0.9])
    late.count()
    assert totals(book(state)) == (3, 0)
    for unit in range(4):
        late.add((unit, 0), [0.9])
    late.count()
    mine.add((3, 0), [0.9])
    mine.count()
    assert totals(mine) == totals(late) == totals(book(state)) == (4, 0)


def test_an_alarm_stands_for_all_nights_that_follow(tmp_path: Path) -> None:
    state = LocalStorage(str(tmp_path))
    mine = book(state)
    mine.add((0, 0), [0.5] * 8)
    alarm = mine.count()
    assert alarm is not None and (alarm.images, alarm.misses, alarm.unit) == (8, 8, 0)
    assert "8 of 8 audited images have an SSIM under 0.84" in alarm.text(PROMISE)
    for unit in range(1, 10):
        mine.add((unit, 0), [0.9] * 100)
    assert mine.count() == alarm and mine.to_dict()["wealth"] < 1
    later = book(state, "b")
    assert later.alarm == alarm and later.count() == alarm
    assert later.to_dict()["runs"] == 2


def test_an_alarm_that_was_due_when_the_process_died_is_raised_by_the_next(tmp_path: Path) -> None:
    state = LocalStorage(str(tmp_path))
    mine = book(state)
    mine.add((0, 0), [0.5] * 8)
    mine.count()
    state.delete(ALARM)
    assert book(state, "b").alarm is not None


def test_another_promise_and_strange_objects_are_refused(tmp_path: Path) -> None:
    state = LocalStorage(str(tmp_path))
    mine = book(state)
    mine.add((0, 0), [0.9])
    mine.count()
    with pytest.raises(ConfigError, match=r"another promise \(alpha: 0\.1 -> 0\.2\)"):
        book(state, "b", promise=Promise(0.84, 0.2, 0.05))
    for content in (b"{", json.dumps({"about": {}}).encode(), b"[]"):
        state.replace("a/000000001.json", content)
        with pytest.raises(StorageError, match=r"give another audit\.state"):
            book(state)


def test_what_a_write_check_leaves_behind_is_no_count(tmp_path: Path) -> None:
    state = LocalStorage(str(tmp_path / "state"))
    for name in ("_probe-0f", "_probe/0f"):
        state.put_if_absent(name, b"probe")
    mine = book(state, num_units=1)
    mine.add((0, 0), [0.9, 0.5])
    mine.count()
    assert totals(mine) == totals(book(state, num_units=1)) == (2, 1)


def test_counting_looks_at_each_waiting_file_once(tmp_path: Path) -> None:
    """A new state on an old run: all its units wait."""

    class Watched(dict[tuple[int, int], tuple[int, int]]):
        num_passes = 0

        def __iter__(self) -> Iterator[tuple[int, int]]:
            self.num_passes += 1
            return super().__iter__()

    mine = book(LocalStorage(str(tmp_path / "state")), num_units=300)
    for unit in range(300):
        mine.add((unit, 0), [0.9])
    mine.add((7, 1), [0.9])
    mine._waiting = waiting = Watched(mine._waiting)
    mine.count()
    assert totals(mine) == (301, 0) and waiting.num_passes < 5


def test_a_damaged_data_file_is_told_in_a_sentence(tmp_path: Path) -> None:
    output = LocalStorage(str(tmp_path / "out"))
    output.replace(data_name(0), b"PAR1 and then nothing")
    with pytest.raises(StorageError, match="is not a readable unit"):
        book(LocalStorage(str(tmp_path / "state"))).catch_up(output)
