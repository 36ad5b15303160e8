"""Arguments that cannot be meant are one sentence and exit 2, before any work and without a trace on the disk."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from generated.calling import call

from skipvar.cli import bench, calibrate, certify_check, convert, evaluate, make_prompts, submit, train_emoji
from skipvar.cli.running import check_folder, local_path, run_job
from skipvar.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
TRIALS = ("conf/calibrate.yaml", "model.path=random:0", "model.device=cpu")
POLICY = "conf/policies/emoji_0.86.json"
PROMPTS = ("mixed", "3", "--out", "{folder}/o.txt")
BAD = [
    (make_prompts.main, [*PROMPTS, f"--seed={2**64}"], "whole number from 0"),
    (make_prompts.main, ["mixed", "0", "--out", "{folder}/o.txt"], "whole number from 1 to 2000"),
    (make_prompts.main, [*PROMPTS, "--without={folder}/latin.txt"], "not UTF-8"),
    (make_prompts.main, [*PROMPTS, "--without={folder}/pipe"], "is no file"),
    (make_prompts.main, ["mixed", "3", "--out=--"], "argument --out: expected a value"),
    (make_prompts.main, ["mixed", "3", "--out=s3://bucket/o.txt"], "no path of a local file"),
    (make_prompts.main, ["mixed", "3", "--out=~nosuchuser/o.txt"], "cannot be used"),
    (bench.main, ["driver", "--units=0"], "whole number from 1"),
    (bench.main, ["driver", "--unit-seconds=nan"], "no number between 0"),
    (bench.main, ["plan", "--rows=-1"], "whole number from 1"),
    (bench.main, ["--images=0"], "whole number from 1"),
    (certify_check.main, [*TRIALS, "--alpha=1"], "between 0 and 1"),
    (certify_check.main, [*TRIALS, "--floor=nan"], "from -1 to 1"),
    (certify_check.main, [*TRIALS, "--splits=0"], "whole number from 1"),
    (evaluate.main, [*TRIALS, "--floor=2"], "from -1 to 1"),
    (evaluate.main, [*TRIALS, "--rounds=0"], "whole number from 1"),
    (evaluate.main, [*TRIALS, "--headline=nobody"], "--headline: nobody"),
    (evaluate.main, [*TRIALS, "--out={folder}/latin.txt"], "no folder to write into"),
    (evaluate.main, [*TRIALS, "--policies", "spread"], "no policy file"),
    (evaluate.main, [*TRIALS, "policy_force=true", "--policies", POLICY, "{folder}/emoji.json"], "two policies"),
    (evaluate.main, [*TRIALS, "output.path=x-{{fingerprint}}", "--sets", "a=x.txt", "a=y.txt"], "two sets"),
    (evaluate.main, [*TRIALS, "--sets", "a={folder}/none.txt"], "does not exist"),
    (calibrate.main, [*TRIALS, "input.path={folder}/latin.txt", "--out={folder}/new/policies"], "not UTF-8"),
    (convert.main, ["--model=emoji", *(f"--{n}=x" for n in ("transformer", "vae", "text-encoder")), "--out=/proc/x/y"],
     "no folder to write into"),
    (train_emoji.main, ["vae", "--minutes=nan"], "no number from 0"),
    (train_emoji.main, ["export", "--run={folder}/latin.txt"], "no folder to write into"),
    (train_emoji.main, ["data", "--packages={folder}/latin.txt"], "no folder to write into"),
    *[(submit.main, [f"--address={address}", "--submission-id=x", "true"], "http://host:port")
      for address in ("nonsense", "ray://127.0.0.1:1", "127.0.0.1:1", "http://[::1", "http://host:99999", "")],
    (submit.main, ["--address=http://u:geheim@host", "--submission-id=x", "true"], "user or password"),
    (submit.main, ["--submission-id=", "true"], "--submission-id"),
]  # fmt: skip


def name_of(value: object) -> str:
    """A part of a case's name that is the same in every process: pytest's workers compare them."""
    return value.__module__ if callable(value) else str(value)[-40:]


@pytest.mark.parametrize(("main", "arguments", "expected"), BAD, ids=name_of)
def test_bad_arguments(main: Callable[..., int], arguments: list[str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "emoji.json").write_bytes((REPOSITORY / POLICY).read_bytes())
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    said = call(main, *(argument.format(folder=tmp_path) for argument in arguments))
    assert said.code == 2 and expected in said.err, said
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and "geheim" not in said.err
    assert sorted(tmp_path.rglob("*")) == before


def test_more_prompts_than_there_are_besides_those_left_out(tmp_path: Path) -> None:
    """It went on drawing for ever."""
    from skipvar.training.prompt_sets import DETAILS, _is_drawn, all_combinations, captions

    plain = [one for one in all_combinations() if _is_drawn(one, DETAILS["plain"])]
    (tmp_path / "w.txt").write_text("\n".join(captions(one)[0] for one in plain[5:]))
    command = ["plain", "9", "--out", str(tmp_path / "o.txt"), "--without", str(tmp_path / "w.txt")]
    assert "are left beside" in call(make_prompts.main, *command).err


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    check_folder("--out", tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out .*file/a: no folder"):
        check_folder("--out", tmp_path / "file" / "a")
    assert local_path("~/x") == Path.home() / "x"


def test_an_error_of_a_file_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(lambda: len((tmp_path / "none").read_bytes())) == 4
    assert capsys.readouterr().err == f"error: {tmp_path}/none: No such file or directory.\n"


def test_a_terminal_that_lacks_letters(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.generate", "conf/emoji.yaml", f"output.path={tmp_path}/ü", "--print-config"],
        cwd=REPOSITORY, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "\\xfc" in done.stdout, done.stderr
