"""What a run tells of its progress."""

import logging

import pytest

from skipvar.distributed import metrics
from skipvar.distributed.messages import Progress
from skipvar.types import UnitReport


def test_a_line_never_tells_of_more_than_there_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A replica's last word on its open units may be older than the report that one of them is published."""
    monkeypatch.setattr(metrics, "LINE_SECONDS", 0.0)
    told = metrics.Metrics(22, 0)
    told.published(
        UnitReport(
            unit=0, num_images=19, num_failures=3, 
            same_content=True, strategies={"base": 19},
        )
    )  # fmt: skip
    with caplog.at_level(logging.INFO, logger="skipvar"):
        told.show([Progress(strategies={"base": 3})])
    assert "22 of 22 done" in caplog.text and " 0:00:00 left" in caplog.text
