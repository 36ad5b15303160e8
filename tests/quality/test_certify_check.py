"""`certify-check` on made-up trials: the promise is kept with and without signal, and a broken rule is found out."""

import json
from pathlib import Path

import numpy as np
import pytest

import skipvar.skip.certify as certify_module
from skipvar.cli.certify_check import main
from skipvar.quality.certify_check import certify_check
from skipvar.skip.policy import Promise
from skipvar.types import Probe, Trial

COSTS = {"base": 100.0, "skip_1": 70.0, "skip_2": 50.0, "skip_3": 30.0}


def trials(count: int) -> list[Trial]:
    chance = np.random.default_rng(3)
    made = []
    for place, fineness in enumerate(chance.uniform(size=count)):
        noise = chance.normal(0, 0.02)
        ssim = {f"skip_{n}": float(1 - 0.1 * n * fineness + noise) for n in (1, 2, 3)} | {"base": 1.0}
        probe = Probe(sobel_change=float(fineness), fft_high_frequency_ratio=float(chance.normal()))
        made.append(Trial(probes={6: probe}, ssim=ssim, prompt=f"p{place}"))
    return made


def test_the_promise_is_kept_and_signal_is_worth_something() -> None:
    found = certify_check(trials(700), Promise(0.84, 0.1, 0.05), COSTS, splits=12)
    assert found["splits_certified"] == 12 and found["share_within_alpha"] >= 0.9
    shuffled = found["shuffled"]
    assert shuffled["splits_certified"] == 12 and shuffled["share_within_alpha"] >= 0.9
    assert found["token_forwards_share"] < shuffled["token_forwards_share"] - 0.05
    json.dumps(found)


def test_two_processes_find_what_one_does() -> None:
    promise = Promise(0.84, 0.1, 0.05)
    one, two = (certify_check(trials(200), promise, COSTS, splits=12, processes=count) for count in (1, 2))
    assert one == two


def test_a_test_that_always_passes_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify_module, "p_value", lambda misses, n, alpha: 0.0)
    found = certify_check(trials(600), Promise(0.84, 0.03, 0.05), COSTS, splits=6)
    assert found["share_within_alpha"] < 0.5 and found["mean_rate"] > 0.06


def test_the_command_refuses_a_configuration_without_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conf/calibrate.yaml", "model.path=random:0", f"output.path={tmp_path}/none"]) == 2
    assert "no finished trials of this configuration; jobs.calibrate makes them." in capsys.readouterr().err
