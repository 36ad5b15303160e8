"""Calibration from a configuration to policy files that the same model loads; a second call makes no trial again."""

import json
from pathlib import Path

import pytest

from jobs.calibrate import main
from skipvar.config import ModelSection
from skipvar.model.pipeline import load_pipeline
from skipvar.skip.policy import ModelFacts, load_policy

MODEL = "model.path=random:0"


def test_trials_become_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials = tmp_path / "trials.jsonl"
    arguments = ["conf/calibrate.yaml", MODEL, "--trials-file", str(trials), "--out", str(tmp_path), "--trials"]
    assert main([*arguments, "5"]) == 0
    assert main([*arguments, "6"]) == 0
    assert main([*arguments, "6"]) == 0  # nothing left to make
    assert len(trials.read_text().splitlines()) == 6
    assert main([*arguments, "6", "sampling.tau=0.7"]) == 0  # other images: none of those will do
    assert len(trials.read_text().splitlines()) == 12
    verdict = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert verdict["trials"] == 6 and len(verdict["spearman_sobel"]) == 3
    pipeline = load_pipeline(ModelSection(name="emoji", path="random:0", dtype="float32", device="cpu"))
    facts = ModelFacts("emoji", 10, pipeline.weights_sha256)
    for floor in (0.84, 0.86, 0.88):
        content = json.loads((tmp_path / f"emoji_{floor}.json").read_text())
        assert content["fit"]["num_trials"] == 6 and content["fit"]["prompts"].endswith("emoji_calibration.txt")
        assert load_policy(str(tmp_path / f"emoji_{floor}.json"), facts).grid_scale == verdict["grid_scale"]


def test_too_few_prompts_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("an apple\n")
    arguments = ["conf/calibrate.yaml", MODEL, f"input.path={prompts}", "--trials-file", str(tmp_path / "t.jsonl")]
    assert main([*arguments, "--trials", "3"]) == 2
    assert "1 usable requests, 3 trials were asked for" in capsys.readouterr().err
