"""Audits: drawn by the request alone, counted once each, and an alarm that is rarely false and soon right."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from skipvar.quality.audit import is_audited, read_scores, share_interval, summarize, wealth
from skipvar.shards.storage import LocalStorage
from skipvar.types import Request


def test_the_draw_depends_on_the_request_alone(make_request: Callable[..., Request]) -> None:
    drawn = [is_audited(make_request(position), 0.1) for position in range(3000)]
    assert 240 < sum(drawn) < 360
    assert drawn[:50] == [is_audited(make_request(position, prompt="other"), 0.1) for position in range(50)]
    assert all(is_audited(make_request(position), 0.2) for position in range(3000) if drawn[position])
    assert not is_audited(make_request(1), 0.0) and is_audited(make_request(1), 1.0)


def _first_alarms(share: float, nights: int, images: int, alpha: float, delta: float) -> np.ndarray:
    """For each night the image at which the alarm was raised first; `images` where it never was."""
    misses = np.cumsum(np.random.default_rng(7).uniform(size=(nights, images)) < share, axis=1)
    known: dict[tuple[int, int], bool] = {}
    alarms = np.full(nights, images)
    for night in range(nights):
        for count in range(1, images + 1):
            key = (count, int(misses[night, count - 1]))
            if key not in known:
                known[key] = wealth(*key, alpha) >= 1 / delta
            if known[key]:
                alarms[night] = count
                break
    return alarms


def test_a_promise_that_holds_rarely_raises_an_alarm_however_often_it_is_looked_at() -> None:
    alarms = _first_alarms(share=0.1, nights=400, images=400, alpha=0.1, delta=0.05)
    assert (alarms < 400).mean() <= 0.05


def test_a_broken_promise_soon_raises_one() -> None:
    alarms = _first_alarms(share=0.25, nights=100, images=400, alpha=0.1, delta=0.05)
    assert (alarms < 400).mean() > 0.98 and np.median(alarms) < 120


def test_no_bet_gains_while_the_share_is_alpha() -> None:
    """The expectation of the next wealth is at most the wealth: a supermartingale, step by step."""
    for images, misses in [(0, 0), (10, 0), (10, 3), (200, 31)]:
        now = wealth(images, misses, 0.1)
        after = 0.1 * wealth(images + 1, misses + 1, 0.1) + 0.9 * wealth(images + 1, misses, 0.1)
        assert after == pytest.approx(now)
    assert wealth(0, 0, 0.1) == pytest.approx(1)
    assert wealth(10_000_000, 9_000_000, 0.1) < float("inf")


def test_a_night_in_numbers() -> None:
    result = summarize([0.9] * 19 + [0.5], floor=0.84, alpha=0.1)
    assert (result.images, result.misses, result.is_alarm) == (20, 1, False)
    assert result.mean_ssim == pytest.approx(0.88) and result.fifth_percentile == pytest.approx(0.88)
    low, high = result.interval
    assert low < 0.05 < high
    assert summarize([0.5] * 20, floor=0.84, alpha=0.1).is_alarm
    assert summarize([], floor=0.84, alpha=0.1).mean_ssim is None
    assert summarize([0.5] * 20, floor=None).interval == (0.0, 1.0)
    assert share_interval(0, 100)[0] == 0 and share_interval(100, 100)[1] == 1


def test_every_audited_image_counts_once(tmp_path: Path) -> None:
    """A retry beside its unit, and a unit that was published twice over: two files, one count for each request."""
    folder = tmp_path / "data"
    folder.mkdir()

    def publish(name: str, rows: list[tuple[int, int, float | None]]) -> None:
        position, index, score = zip(*rows, strict=True)
        columns = {"position": position, "image_index": index, "audit_ssim": pa.array(score, pa.float64())}
        pq.write_table(pa.table(columns), folder / name)

    publish("unit-000000000.parquet", [(0, 0, 0.9), (0, 1, None), (1, 0, 0.8)])
    publish("unit-000000000.retry-1.parquet", [(0, 1, 0.7), (1, 0, 0.8)])
    publish("unit-000000001.parquet", [(2, 0, None)])
    publish("stranger.parquet", [(3, 0, 0.1)])
    scores = read_scores(LocalStorage(str(tmp_path)))
    assert scores == {(0, 0): 0.9, (1, 0): 0.8, (0, 1): 0.7}
