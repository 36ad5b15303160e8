"""What stops a command decides its exit code, before any work as well as after it."""

from pathlib import Path

import pytest

from jobs import export, generate, verify
from skipvar import errors

CODES = {"ConfigError": 2, "InputError": 2, "RowError": 2, "ModelError": 2, "StorageError": 4, "StoppedError": 4}


def test_every_error_has_its_code() -> None:
    for name, code in CODES.items():
        assert getattr(errors, name).exit_code == code
    assert {kind.__name__ for kind in errors.SkipvarError.__subclasses__()} <= CODES.keys()


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> str:
    """An endpoint where nobody answers, and credentials for it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    return "http://127.0.0.1:9"


def test_storage_that_does_not_answer_is_4_before_any_work(
    unreachable: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"storage.endpoint_url={unreachable}", "storage.retry_seconds=0.5", "cluster.address=local"]
    code = generate.main(["conf/emoji.yaml", *settings, "input.path=s3://bucket/a.txt", f"output.path={tmp_path}/out"])
    assert code == 4
    assert capsys.readouterr().err.count("error:") == 1
    assert verify.main(["s3://bucket/out", "--endpoint-url", unreachable, "--retry-seconds", "0.5"]) == 4


def test_the_user_s_mistakes_are_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["conf/emoji.yaml", f"input.path={tmp_path}/none.txt", f"output.path={tmp_path}/out"]) == 2
    assert generate.main(["conf/emoji.yaml", "sampling.cgf=3"]) == 2
    assert verify.main(["gs://x"]) == 2
    assert export.main([str(tmp_path), "--to", "geneval", str(tmp_path)]) == 2
    assert "Traceback" not in capsys.readouterr().err
