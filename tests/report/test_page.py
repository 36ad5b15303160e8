"""The report of a run: it adds up, shows what comes from outside as text, and works in a real browser."""

import dataclasses
import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from skipvar.cli.report import main
from skipvar.report.gather import MAX_PICTURES, MAX_POINTS, gather
from skipvar.report.page import render, write_report
from skipvar.types import Failure, Image, Request
from tests.shards.making import Job, make_config, make_dataset, refuse_bad, write

EVIL = "<script>document.title='owned'</script>"
CHROMIUM = shutil.which("chromium")


def _audited(request: Request) -> Image | Failure:
    image = refuse_bad(request)
    if isinstance(image, Failure) or request.position % 2:
        return image
    return dataclasses.replace(image, audit_ssim=0.7 + 0.02 * request.position)


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
    assert len(facts.pictures) == 12 and len(facts.points) <= MAX_POINTS
    # the least similar first
    assert [shown.audit_ssim for shown in facts.pictures[:2]] == [
        pytest.approx(0.7),
        pytest.approx(0.74),
    ]


def test_pictures_are_a_sample_whatever_the_number_of_rows(tmp_path: Path) -> None:
    job = make_dataset(tmp_path, [f"p{place}" for place in range(2 * MAX_PICTURES)])
    facts = gather(job.storage)
    assert facts.num_images == 2 * MAX_PICTURES and len(facts.pictures) == MAX_PICTURES
    assert len(render(facts)) < 20_000_000


def test_an_empty_run_and_one_that_still_runs_have_a_report(tmp_path: Path) -> None:
    job = make_dataset(tmp_path, ["a bad one"])
    ending = {"state": "running", "config": {"model": {"name": "emoji"}}}
    assert "0 images with emoji: running" in render(gather(job.storage, ending))


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


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_it_works_in_a_browser(job: Job, tmp_path: Path) -> None:
    """No console error, charts drawn, the filter filters, a script in a prompt does not run."""
    page = Path(write_report(job.storage)).read_text()
    typed = '<script>text.value = "PANDA"; text.dispatchEvent(new Event("input"));</script></body>'
    (tmp_path / "page.html").write_text(page.replace("</body>", typed))
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path}/u"]
    command = [CHROMIUM, *flags, "--dump-dom", f"file://{tmp_path}/page.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    assert "<title>12 images" in done.stdout and "1 shown" in done.stdout
    assert done.stdout.count('hidden=""') == 11
    assert done.stdout.count("<circle") == 12 and done.stdout.count("<rect") == 20
