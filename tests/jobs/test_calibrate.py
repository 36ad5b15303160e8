"""Calibration from a configuration to policy files that the same model loads; its trials are a run like any other."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from skipvar.cli.calibrate import main
from skipvar.config_file import load_config
from skipvar.engine.resolved import resolve
from skipvar.skip.features import DecodedProbe
from skipvar.skip.strategy import STRATEGY_NAMES

REPOSITORY = Path(__file__).parents[2]
Calibrate = Callable[..., subprocess.CompletedProcess[str]]


def command(folder: Path, *arguments: str) -> list[str]:
    tiny = ["model.path=random:0", "model.device=cpu", "cluster.replicas.max=1", "output.unit_rows=2"]
    output = [f"output.path={folder}/trials", "--out", str(folder / "policies")]
    return [sys.executable, "-m", "jobs.calibrate", "conf/calibrate.yaml", *tiny, *output, *arguments]


@pytest.fixture
def calibrate(tmp_path: Path) -> Calibrate:
    """Runs jobs.calibrate on conf/calibrate.yaml with seeded random weights, into `tmp_path`."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        asked = command(tmp_path, *arguments)
        return subprocess.run(asked, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)

    return run


def test_killed_trials_are_resumed_and_become_policies(tmp_path: Path, calibrate: Calibrate) -> None:
    """SIGKILL after the first unit: what was published stays as it is, the rest is made, and each image stands once."""
    first = tmp_path / "trials" / "data" / "unit-000000000.parquet"
    killed = subprocess.Popen(
        command(tmp_path, "input.limit=8"), cwd=REPOSITORY, start_new_session=True, stdout=subprocess.DEVNULL
    )
    for _ in range(2400):
        if first.exists() or killed.poll() is not None:
            break
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    published = first.read_bytes()
    done = calibrate("input.limit=8")
    assert done.returncode == 0, done.stderr
    assert "Resuming run" in done.stderr and first.read_bytes() == published
    rows = pq.read_table(tmp_path / "trials" / "data").to_pylist()
    assert sorted(row["position"] for row in rows) == list(range(8))
    assert all(row["trial_ssim"].keys() == set(STRATEGY_NAMES) and row["trial_ssim"]["base"] == 1 for row in rows)
    whole = subprocess.run(
        [sys.executable, "-m", "jobs.verify", str(tmp_path / "trials"), "--full"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert whole.returncode == 0, whole.stdout
    assert "8 prompts put 4 in the test part, too few to certify a share of 0.1" in done.stdout
    assert "emoji_certified_0.88.json: not written" in done.stdout
    verdict = json.loads(done.stdout.splitlines()[-1])
    assert verdict["trials"] == 8 and len(verdict["spearman_sobel"]) == 3
    for floor in (0.84, 0.86, 0.88):
        path = tmp_path / "policies" / f"emoji_{floor}.json"
        assert json.loads(path.read_text())["fit"]["num_trials"] == 8
        config = load_config("conf/emoji.yaml", ["model.path=random:0", f"policy={path}"])
        assert resolve(config).policy.probe == DecodedProbe(verdict["grid_scale"])
    assert {"latents 2x2", "latents 2x2, a scale earlier", "decoded at scale 4"} <= verdict["probes"].keys()
    assert all(told["seconds"] > 0 for told in verdict["probes"].values())


def test_what_cannot_be_calibrated_is_told_before_any_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "prompts.txt").write_text("an apple\n")
    output = f"output.path={tmp_path}/trials"
    cases = {
        "1 images; at least 5 are needed": [f"input.path={tmp_path}/prompts.txt", "--out", str(tmp_path / "policies")],
        f"--out {tmp_path}/file: no folder to write into": ["--out", str(tmp_path / "file")],
    }
    for message, arguments in cases.items():
        assert main(["conf/calibrate.yaml", "model.path=random:0", output, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "trials").exists()
