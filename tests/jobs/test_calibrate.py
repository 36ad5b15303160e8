"""Calibration from a configuration to policy files that the same model loads; a second call makes no trial again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.calibrate import main
from skipvar.config import ModelSection
from skipvar.config_file import load_config
from skipvar.engine.build import sampling_rules
from skipvar.engine.resolved import resolve
from skipvar.errors import ConfigError
from skipvar.model.pipeline import load_pipeline
from skipvar.quality.calibrate import _made_from, _requests
from skipvar.skip.policy import ModelFacts, load_policy
from skipvar.skip.strategy import STRATEGY_NAMES
from skipvar.types import Probe

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
    shown = capsys.readouterr().out
    verdict = json.loads(shown.splitlines()[-1])
    assert "emoji_certified_0.88.json: not written: 3 prompts in the test part prove nothing" in shown
    assert not list(tmp_path.glob("*certified*"))
    assert verdict["trials"] == 6 and len(verdict["spearman_sobel"]) == 3
    pipeline = load_pipeline(ModelSection(name="emoji", path="random:0", dtype="float32", device="cpu"))
    facts = ModelFacts("emoji", 10, pipeline.weights_sha256)
    for floor in (0.84, 0.86, 0.88):
        content = json.loads((tmp_path / f"emoji_{floor}.json").read_text())
        assert content["fit"]["num_trials"] == 6 and content["fit"]["prompts"].endswith("emoji_calibration.txt")
        assert load_policy(str(tmp_path / f"emoji_{floor}.json"), facts).grid_scale == verdict["grid_scale"]


def test_a_certified_policy_is_written_where_the_trials_prove_one_and_refused_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trials are made up in the file that a first call has left; the certified file is then used by a run."""
    trials = tmp_path / "trials.jsonl"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{count} apples\n" for count in range(120)))
    config = load_config("conf/calibrate.yaml", [MODEL, f"input.path={prompts}"])
    pipeline = load_pipeline(config.model)
    rules = sampling_rules(config, pipeline.config)
    with trials.open("w") as file:
        for request in _requests(config, pipeline, 120):
            probes = {str(scale): {"sobel_change": 0.1, "fft_high_frequency_ratio": 0.2} for scale in range(4, 10)}
            ssim = {name: 0.5 if name == "skip_3" else 0.95 for name in STRATEGY_NAMES} | {"base": 1.0}
            made = {"id": request.id, "prompt": request.prompt, "ssim": ssim, "probes": probes}
            file.write(json.dumps(made | {"made_from": _made_from(request, rules, pipeline)}) + "\n")
    arguments = ["conf/calibrate.yaml", MODEL, f"input.path={prompts}", "--trials-file", str(trials)]
    assert main([*arguments, "--out", str(tmp_path), "--trials", "120"]) == 0
    assert "at most 0.1 of images have an SSIM to base under 0.88" in capsys.readouterr().out
    path = str(tmp_path / "emoji_certified_0.88.json")
    policy = resolve(replace(config, policy=path)).policy
    (request,) = _requests(config, pipeline, 1)
    decision = policy.decide(request, Probe(sobel_change=0.1, fft_high_frequency_ratio=0.2))
    assert decision.strategy == "skip_2_uncond_1", "the cheapest of those that keep the floor"
    other = load_config("conf/calibrate.yaml", [MODEL, f"policy={path}", "sampling.cfg=4"])
    with pytest.raises(ConfigError, match=r"promises nothing for this cfg \(tested with 2.0, this run has 4.0\)"):
        resolve(other)


def test_too_few_prompts_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("an apple\n")
    arguments = ["conf/calibrate.yaml", MODEL, f"input.path={prompts}", "--trials-file", str(tmp_path / "t.jsonl")]
    assert main([*arguments, "--trials", "5"]) == 2
    assert "1 usable requests, 5 trials were asked for" in capsys.readouterr().err


def test_what_cannot_be_calibrated_is_told_before_any_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    cases = {
        "at least 5 are needed": ["--trials", "0"],
        f"--trials-file {tmp_path}: it is a folder": ["--trials", "6", "--trials-file", str(tmp_path)],
        "it is a file": ["--trials", "6", "--trials-file", str(tmp_path / "t"), "--out", str(tmp_path / "file")],
    }
    for message, arguments in cases.items():
        assert main(["conf/calibrate.yaml", MODEL, *arguments]) == 2
        assert message in capsys.readouterr().err
