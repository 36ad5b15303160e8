"""The report of a run: it adds up, shows what comes from outside as text, and stays small whatever the run's size.

`tests/e2e` looks at it in a real browser.
"""

import dataclasses
import html
import os
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pytest

from skipvar.cli.report import main
from skipvar.report.charts import histogram, scatter, throughput, work_time
from skipvar.report.gather import MAX_PAIRS_SHOWN, MAX_PICTURES, MAX_POINTS, Point, Stretch, gather, read_points
from skipvar.report.page import render, write_report
from skipvar.shards.schema import dataset_schema
from skipvar.shards.storage import LocalStorage
from skipvar.shards.unitfile import UnitFile, UnitFooter, data_name
from skipvar.types import Failure, Image, Request
from tests.shards.making import Job, make_config, make_dataset, refuse_bad, write

EVIL = "<script>document.title='owned'</script>"


def _audited(request: Request) -> Image | Failure:
    image = refuse_bad(request)
    if isinstance(image, Failure) or request.position % 2:
        return image
    return dataclasses.replace(
        image, audit_ssim=0.7 + 0.02 * request.position, base_pixels=255 - image.pixels, base_seconds=0.03,
        phase_seconds={"prefix": 0.006, "decode": 0.004},
    )  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("report")
    prompts = [f"prompt {place}" for place in range(10)] + [EVIL, "a bad <b>one</b>", "a panda"]
    path = write(folder / "prompts.txt", "\n".join(prompts) + "\n")
    made = Job(make_config(input__path=path, output__path=str(folder / "out"), output__unit_rows=4), _audited)
    made.make_units()
    made.finish()
    return made


def test_its_numbers_add_up(job: Job) -> None:
    facts = gather(job.storage)
    assert facts.num_images == 12 and facts.strategies.total() == 12 and facts.saved == pytest.approx(2)
    assert facts.errors == {"ValueError": 1} and facts.error_examples == {"ValueError": "a bad prompt"}
    assert facts.audit.images == 7 and facts.audit.mean_ssim == pytest.approx(0.82)
    assert facts.speed == pytest.approx(3)
    assert len(facts.pictures) == 12 and len(facts.points) <= MAX_POINTS
    assert [shown.ssim for shown in facts.pairs] == pytest.approx([0.7 + 0.04 * place for place in range(7)])
    phases = {name for stretch in facts.stretches for name in stretch.phase_seconds}
    assert sum(stretch.images for stretch in facts.stretches) == 12 and phases == {"prefix", "decode"}


def test_pictures_are_a_sample_whatever_the_number_of_rows(tmp_path: Path) -> None:
    job = make_dataset(tmp_path, [f"p{place}" for place in range(2 * MAX_PICTURES)])
    facts = gather(job.storage)
    assert facts.num_images == 2 * MAX_PICTURES and len(facts.pictures) == MAX_PICTURES


def test_an_empty_run_and_one_that_still_runs_have_a_report(tmp_path: Path) -> None:
    job = make_dataset(tmp_path, ["a bad one"])
    page = render(gather(job.storage, {"state": "running", "parts": {"model": {"name": "emoji"}}}))
    assert "0 images, model emoji" in page and "0 of 1 images are here; 1 could not be made" in page


def test_half_a_character_in_a_damaged_record_is_shown_as_a_question_mark(tmp_path: Path) -> None:
    job = make_dataset(tmp_path, ["a"])
    write_report(job.storage, {"state": "\ud800", "parts": {"model": {"name": "emo\udc00ji"}}})
    assert "emo?ji" in job.storage.read("report.html").decode()


def test_all_from_outside_is_text_and_nothing_is_fetched(job: Job) -> None:
    page = render(gather(job.storage))
    assert EVIL not in page and html.escape(EVIL) in page.replace("&#39;", "&#x27;")
    assert not re.search(r"""(src|href)=["']?(?!data:)[a-z/]""", page) and "url(" not in page and "@import" not in page
    assert page.count("<script") == 1 and "default-src 'none'" in page


def test_the_command_writes_it_beside_the_dataset(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([job.storage.uri]) == 0
    assert Path(capsys.readouterr().out.strip()).read_text().startswith("<!doctype html>")
    assert main([job.storage.uri + "/nothing"]) == 4
    assert "holds no run" in capsys.readouterr().err


def test_a_damaged_unit_is_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_dataset(tmp_path, ["a", "b"])
    (Path(job.storage.uri) / data_name(0)).write_bytes(b"PAR1 and then nothing")
    assert main([job.storage.uri]) == 4
    assert "is not a readable unit" in capsys.readouterr().err


class CountingStorage(LocalStorage):
    """Adds up what is read of files that are opened."""

    num_bytes = 0

    def open(self, name: str) -> BinaryIO:
        return _CountingFile(super().open(name), self)  # type: ignore[return-value]


class _CountingFile:
    def __init__(self, file: BinaryIO, storage: CountingStorage) -> None:
        self._file, self._storage = file, storage

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._storage.num_bytes += len(data)
        return data

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def __enter__(self) -> "_CountingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._file)


ROWS, UNITS = 4000, 250


def _million(folder: Path, prompt: str) -> CountingStorage:
    """The dataset of a million rows, cheaply: one file of 4,000 under 250 names. Its pictures are 160 MB of noise."""
    job = make_dataset(folder, [prompt])
    [row] = pa.Table.from_batches(_rows(job)).to_pylist()
    noise = np.random.default_rng(1)
    picture = row["image"]["bytes"]
    rows = []
    for place in range(ROWS):
        image = {"bytes": picture + noise.bytes(40_000), "path": None}  # what follows a PNG's end is not looked at
        score = float(noise.beta(20, 2)) if place % 20 == 0 else None
        rows.append({**row, "image": image, "position": place, "strategy": ("base", "skip_1", "skip_3")[place % 3],
                     "audit_ssim": score, "probe_sobel_change": float(noise.random())})  # fmt: skip
    file = UnitFile(dataset_schema(pa.schema([])), rows, max_row_group_bytes=1 << 40)
    footer = UnitFooter(unit=0, retry=0, rows=ROWS, content_hash="", fingerprint="", phase_seconds={"prefix": 10.0})
    path = Path(job.storage.uri) / data_name(0)
    path.write_bytes(file.finish(footer.to_metadata()))
    for unit in range(1, UNITS):
        os.link(path, path.parent.parent / data_name(unit))
    return CountingStorage(job.storage.uri)


def _rows(job: Job) -> list[pa.RecordBatch]:
    import pyarrow.parquet as pq

    return pq.read_table(Path(job.storage.uri) / data_name(0)).to_batches()


def test_a_million_rows_are_read_by_columns_and_make_a_small_page(tmp_path: Path) -> None:
    storage = _million(tmp_path, "a long prompt " * 20)
    size = (Path(storage.uri) / data_name(0)).stat().st_size
    tracemalloc.start()
    facts = write_report(storage)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert facts.num_images == ROWS * UNITS and facts.audit.images == ROWS * UNITS // 20
    assert len(facts.pictures) == MAX_PICTURES and len(facts.points) <= MAX_POINTS
    assert len(facts.pairs) <= MAX_PAIRS_SHOWN
    assert (Path(storage.uri) / "report.html").stat().st_size < 5_000_000  # the goal is 20 MB
    assert peak < 100_000_000
    assert size * UNITS > 40e9 and storage.num_bytes < 300e6  # of 40 GB: small columns, and a page a picture


def test_time_stands_still_while_nothing_is_made() -> None:
    """Two sessions of ten seconds with an hour between them: twenty seconds at work, and a cut in the axis."""
    phases = {"prefix": 3.0, "decode": 1.0}
    starts = (0.0, 5.0, 3605.0, 3610.0)
    stretches = [Stretch(start=s, end=s + 5.0, images=50, phase_seconds=phases) for s in starts]
    clock = work_time(stretches[::-1])
    assert clock.seconds == 20 and clock.cuts == [10]
    assert [(stretch.start, stretch.end) for stretch in clock.stretches] == [(0, 5), (5, 10), (10, 15), (15, 20)]
    chart = throughput(stretches)
    assert chart is not None and len(chart.cuts) == 1 and "10 images per second over 20 seconds" in chart.told
    assert "prefix 75%, decode 25%" in chart.told
    heights = {style: sum(mark.height for mark in chart.marks if mark.style == style) for style, _ in chart.legend}
    assert heights["phase-prefix"] == pytest.approx(3 * heights["phase-decode"])
    assert throughput([]) is None and throughput(stretches[:0]) is None


def test_the_histogram_s_bars_hold_every_score_and_mark_those_under_the_floor() -> None:
    scores = np.array([0.2, 0.5, 0.83, 0.9, 0.95, 1.0])
    chart = histogram(scores, 0.84)
    assert chart is not None and "3 of them under 0.84" in chart.told
    assert sum(int(mark.label.split()[0]) for mark in chart.marks) == 6
    assert sum(int(mark.label.split()[0]) for mark in chart.marks if mark.style == "under") == 3
    assert histogram(np.array([1.0]), None) is not None and histogram(np.empty(0), 0.8) is None


def test_the_scatter_shows_chances_where_no_probe_was_decoded() -> None:
    table = pa.table(
        {
            "probe_sobel_change": [0.1, None, None, None],
            "probe_fft_high_frequency_ratio": [0.2, None, None, None],
            "strategy_scores": [{"skip_1": 0.9, "skip_3": 0.4}] * 2 + [{"skip_1": float("nan"), "skip_3": 0.4}, None],
            "strategy": ["base", "skip_1", "skip_1", "base"],
        }
    )
    points = read_points(table)
    assert points == [Point(0.1, 0.2, "base", is_chance=False), Point(0.9, 0.4, "skip_1", is_chance=True)]
    chart = scatter(points[1:] * 2, {"skip_1": "s1"})
    assert chart is not None and "chance" in chart.x.name and "chance" in chart.told


def test_error_rows_are_those_that_count(tmp_path: Path) -> None:
    """A retry that fails otherwise takes the place of what it made again."""
    path = write(tmp_path / "prompts.txt", "a cat\nbad one\nbad two\n")
    why: Exception = ValueError("first")

    def make(request: Request) -> Image | Failure:
        return Failure.of(request, why) if "bad" in request.prompt else refuse_bad(request)

    job = Job(make_config(input__path=path, output__path=str(tmp_path / "out"), output__unit_rows=2), make)
    job.make_units()
    why = KeyError("second")
    job.make_units([next(iter(job.ledger.retry_units(job.plan)))])
    job.finish()
    facts = gather(job.storage)
    assert facts.errors == {"KeyError": 1, "ValueError": 1}
    assert facts.error_examples == {"KeyError": "'second'", "ValueError": "first"}


def test_the_page_says_why_nothing_was_measured(tmp_path: Path) -> None:
    job = make_dataset(tmp_path, ["a"])
    assert "not measured: audit.fraction is 0" in render(gather(job.storage))
    page = render(gather(job.storage, {"config": {"audit": {"fraction": 0.01}}}))
    assert "audit.fraction is 0<" not in page and "no image was drawn at an audit.fraction of 0.01" in page
