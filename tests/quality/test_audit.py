"""Audits: drawn by the request alone, and an alarm that is rarely false and soon right."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from skipvar.quality.audit import is_audited, share_interval, summarize, wealth
from skipvar.types import Request


def test_the_draw_depends_on_the_request_alone(make_request: Callable[..., Request]) -> None:
    drawn = [is_audited(make_request(position), 0.1) for position in range(3000)]
    assert 240 < sum(drawn) < 360
    assert drawn[:50] == [is_audited(make_request(position, prompt="other"), 0.1) for position in range(50)]
    assert all(is_audited(make_request(position), 0.2) for position in range(3000) if drawn[position])
    assert not is_audited(make_request(1), 0.0) and is_audited(make_request(1), 1.0)


def _share_of_alarms(share: float, nights: int, images: int, alpha: float, delta: float) -> tuple[float, float]:
    """How many of so many nights ever raise an alarm, looked at after every image; the median of the first moments."""
    misses = np.cumsum(np.random.default_rng(7).uniform(size=(nights, images)) < share, axis=1)
    fewest = np.array(
        [next(m for m in range(count + 2) if m > count or wealth(count, m, alpha) >= 1 / delta)
         for count in range(1, images + 1)]
    )  # fmt: skip
    is_alarm = misses >= fewest
    first = np.where(is_alarm.any(axis=1), is_alarm.argmax(axis=1) + 1, images)
    return float(is_alarm.any(axis=1).mean()), float(np.median(first))


@pytest.mark.parametrize(("alpha", "delta"), [(0.1, 0.05), (0.1, 0.2), (0.02, 0.1)])
def test_a_promise_that_holds_rarely_raises_an_alarm_however_often_it_is_looked_at(alpha: float, delta: float) -> None:
    """5,000 nights of 500 audited images at the very share that was promised: the worst case."""
    found, _ = _share_of_alarms(share=alpha, nights=5000, images=500, alpha=alpha, delta=delta)
    assert 0 < found <= delta + 3 * math.sqrt(delta * (1 - delta) / 5000)


def test_a_broken_promise_soon_raises_one() -> None:
    found, median = _share_of_alarms(share=0.25, nights=1000, images=400, alpha=0.1, delta=0.05)
    assert found > 0.98 and median < 120


def test_no_bet_gains_while_the_share_is_alpha() -> None:
    """The expectation of the next wealth is at most the wealth: a supermartingale, step by step."""
    for images, misses in [(0, 0), (10, 0), (10, 3), (200, 31)]:
        now = wealth(images, misses, 0.1)
        after = 0.1 * wealth(images + 1, misses + 1, 0.1) + 0.9 * wealth(images + 1, misses, 0.1)
        assert after == pytest.approx(now)
    assert wealth(0, 0, 0.1) == pytest.approx(1)
    assert wealth(10_000_000, 9_000_000, 0.1) < float("inf")


def test_a_night_in_numbers() -> None:
    result = summarize([0.9] * 19 + [0.5], floor=0.84)
    assert (result.images, result.misses, result.share) == (20, 1, 0.05)
    assert result.mean_ssim == pytest.approx(0.88) and result.fifth_percentile == pytest.approx(0.88)
    low, high = result.interval
    assert low < 0.05 < high
    assert result.mean_interval == pytest.approx((0.88 - 1.959964 * 0.02, 0.88 + 1.959964 * 0.02))
    assert "5.0% under 0.84" in result.text() and "mean SSIM 0.880" in result.text()
    empty = summarize([], floor=0.84)
    assert empty.mean_ssim is None and empty.text() == "no image was audited" and empty.share == 0
    assert summarize([0.5] * 20, floor=None).interval == (0.0, 1.0)
    assert share_interval(0, 100)[0] == 0 and share_interval(100, 100)[1] == 1
