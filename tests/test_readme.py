"""What README tells a newcomer to type works as it stands there."""

import re
import shlex
from pathlib import Path

import pytest

from skipvar.cli.generate import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own with the repository's conf/ in it."""
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_in_python(folder: Path) -> None:
    [example] = re.findall(r"## In Python\n\n```python\n(.*?)```", README, re.S)
    exec(example, {})
    assert len(list(folder.glob("*.png"))) == 2


def test_the_command_for_ones_own_prompts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [command] = re.findall(
        r"## Your own prompts\n\n```sh\n\. \.venv/bin/activate.*\npython -m jobs\.generate (.*?)\n", README
    )
    (folder / "prompts.jsonl").write_text('{"prompt": "an apple"}\n')
    assert main([*shlex.split(command), "--dry-run"]) == 0, capsys.readouterr().err
