"""The report in a real browser: it draws, filters, shows what comes from outside as text, and is accessible."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from skipvar.report.page import write_report
from skipvar.types import Failure, Image, Request
from tests.e2e.conftest import OpenPage
from tests.shards.making import Job, draw, make_config, write

EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
ENGINE = {
    "prefix": {"batches": 5, "images": 18, "capacity": 20, "fill": 0.9},
    "suffix": {"skip_1": {"batches": 3, "images": 6, "capacity": 12, "fill": 0.5}},
    "whole": {},
}


def audited(request: Request) -> Image | Failure:
    """Every other image is audited, and has a twin; the third prompt fails."""
    if request.position == 2:
        return Failure.of(request, ValueError(EVIL))
    phases = {"text": 0.1, "prefix": 0.5, "probe": 0.1, "suffix": 0.2, "decode": 0.1}
    image = dataclasses.replace(draw(request), phase_seconds=phases, engine_seconds=1.0)
    if request.position % 2:
        return image
    ssim = 0.7 + 0.015 * request.position
    return dataclasses.replace(image, audit_ssim=ssim, base_pixels=np.roll(image.pixels, 1, 0), base_seconds=2.0)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    prompts = [f"prompt {place}" for place in range(17)] + [EVIL, "a panda", "a PANDA in the snow"]
    path = write(folder / "prompts.txt", "\n".join(prompts) + "\n")
    job = Job(make_config(input__path=path, output__path=str(folder / "out"), output__unit_rows=4), audited)
    job.make_units()
    promise = {"floor": 0.8, "alpha": 0.1, "delta": 0.05}
    alarm = {"images": 9, "misses": 6, "wealth": 99.0, "fingerprint": "f", "unit": 3, "raised_at": "now"}
    state = {"state": "s", "promise": promise, "runs": 1, "images": 9, "misses": 6, "wealth": 99.0, "alarm": alarm}
    counts = {"requests": 20, "engine": ENGINE, "audit_state": state, "cost": {"usd": 1.25}}
    facts = write_report(job.storage, {"state": "finished_with_errors", "counts": counts, "parts": {"model": {}}})
    assert len(facts.pairs) > 5 and facts.speed == pytest.approx(2)
    return Path(job.storage.uri) / "report.html"


def test_charts_are_drawn_and_the_filter_filters(report: Path, open_page: OpenPage) -> None:
    page = open_page(report)
    assert page.title().startswith("19 images, finished with errors")
    charts = page.get_by_role("img")
    assert page.locator("svg circle").count() == 19
    assert page.locator("svg rect").count() > 5
    assert charts.filter(has=page.locator("rect")).first.bounding_box()["height"] > 150  # type: ignore[index]
    assert page.get_by_role("alert").inner_text().startswith("Alarm. Audit alarm: 6 of 9 audited images")
    assert page.get_by_role("status").inner_text().endswith("shown")
    everything = page.locator("[data-strategy]:visible").count()
    page.get_by_label("Prompt contains").fill("panda")
    pandas = page.locator("[data-strategy]:visible")
    assert 2 <= pandas.count() < everything
    assert all("panda" in text.lower() for text in pandas.all_inner_texts())
    page.get_by_label("Prompt contains").fill("no such thing")
    assert pandas.count() == 0 and "Nothing matches" in page.get_by_role("status").inner_text()
    page.get_by_role("button", name="Show all").click()
    expect(page.locator("[data-strategy][hidden]")).to_have_count(0)  # waits; the page forbids evaluated strings
    page.get_by_role("combobox").select_option("skip_1")
    assert {item.get_attribute("data-strategy") for item in pandas.all()} == {"skip_1"}


def test_the_worst_audited_image_comes_first_beside_base(report: Path, open_page: OpenPage) -> None:
    page = open_page(report)
    pairs = page.locator(".pairs li")
    shown = [float(re.search(r"SSIM ([\d.]+)", text)[1]) for text in pairs.all_inner_texts()]  # type: ignore[index]
    assert shown == sorted(shown) and shown[0] == 0.7
    first = pairs.first
    assert first.locator("figcaption").all_inner_texts()[1:] == ["base", "difference"]
    first.scroll_into_view_if_needed()
    for picture in first.locator("img").all():
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 24


def test_what_comes_from_outside_is_text(report: Path, open_page: OpenPage) -> None:
    page = open_page(report)
    assert "owned" not in page.title()
    assert page.get_by_text(EVIL).count() >= 2  # the prompt, and the message of an error
    assert page.locator("script").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_accessible_and_fits(report: Path, open_page: OpenPage, width: int, scheme: str) -> None:
    page = open_page(report, width=width, scheme=scheme)
    page.evaluate("for (const more of document.querySelectorAll('details')) more.open = true")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_keyboard_alone_reaches_everything(report: Path, open_page: OpenPage) -> None:
    page = open_page(report)
    reached = []
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert reached == ["strategy", "text", "BUTTON", "SUMMARY", "SUMMARY", "SUMMARY"]
    page.keyboard.press("Enter")
    assert page.get_by_role("row", name="fingerprint").first.is_visible()
