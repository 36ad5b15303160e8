"""Sets of prompts: composed by seed, of the detail that their name says."""

import json
from pathlib import Path

import pytest

from skipvar.cli.make_prompts import main
from skipvar.training.prompt_sets import DETAILS, compose

PROMPTS = Path(__file__).parents[2] / "conf" / "prompts"


@pytest.mark.parametrize("detail", DETAILS)
def test_a_set_is_fixed_by_its_seed_and_repeats_nothing(detail: str) -> None:
    prompts = compose(detail, 60, seed=5)
    assert prompts == compose(detail, 60, seed=5) != compose(detail, 60, seed=6)
    assert len({prompt.prompt for prompt in prompts}) == 60


def test_sets_ask_for_the_detail_that_they_promise() -> None:
    plain, high = ({prompt.group for prompt in compose(detail, 80, seed=0)} for detail in ("plain", "high"))
    assert plain == {"plain, one", "plain, four"}
    assert not any(group.startswith("plain") or group.endswith("one") for group in high)
    mixed = [prompt.group for prompt in compose("mixed", 400, seed=0)]
    assert len(set(mixed)) == 15
    assert 0.4 < sum(group.startswith("plain") for group in mixed) / 400 < 0.6


def test_the_shipped_sets_are_what_their_commands_make(tmp_path: Path) -> None:
    assert main(["mixed", "96", "--seed", "1", "--out", str(tmp_path / "emoji.txt")]) == 0
    assert (tmp_path / "emoji.txt").read_bytes() == (PROMPTS / "emoji.txt").read_bytes()
    out = tmp_path / "calibration.jsonl"
    assert main(["mixed", "2000", "--seed", "2", "--without", str(PROMPTS / "emoji.txt"), "--out", str(out)]) == 0
    assert out.read_bytes() == (PROMPTS / "emoji_calibration.jsonl").read_bytes()
    calibration = {json.loads(line)["prompt"] for line in out.read_text().splitlines()}
    assert calibration.isdisjoint((PROMPTS / "emoji.txt").read_text().splitlines())


@pytest.mark.parametrize(
    "arguments",
    [["mixed", "9", "--out", "p.csv"], ["mixed", "9", "--out", "no/p.txt"]],
)
def test_mistakes_are_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("error: ") == 1
