"""`skipvar COMMAND` and `python -m jobs.COMMAND` are the same; errors are one sentence with their exit code."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from skipvar.cli.main import COMMANDS, main
from skipvar.cli.running import run_job
from skipvar.errors import InputError, StorageError

REPOSITORY = Path(__file__).parents[2]
JOBS = {"convert": "convert_checkpoint"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_its_job(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    job = importlib.import_module(f"jobs.{JOBS.get(command, command)}")
    assert job.main is importlib.import_module(f"skipvar.cli.{command}").main
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: skipvar {command} " in capsys.readouterr().out


def test_the_script_is_installed() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"skipvar": "skipvar.cli.main:main"}


def test_the_code_and_the_sentence_are_the_command_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path / "none.yaml")]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and shown.err.count("\n") == 1


@pytest.mark.parametrize(("given", "code"), [([], 2), (["paint"], 2), (["--help"], 0)])
def test_usage(given: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == code
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err and all(name in shown.out + shown.err or not given for name in COMMANDS)


@pytest.mark.parametrize("error", [InputError("a.txt: broken."), StorageError("s3://x: gone.")])
def test_what_stops_a_job_is_told_once(error: InputError | StorageError, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise error

    assert run_job(fail) == error.exit_code
    assert capsys.readouterr().err == f"error: {error}\n"
    assert run_job(lambda: 3) == 3


def test_asking_for_help_loads_neither_torch_nor_ray() -> None:
    code = "import sys, skipvar.cli.main, skipvar.cli.generate; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
