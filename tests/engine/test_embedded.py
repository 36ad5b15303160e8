"""The embedded model as it is shipped: every strategy runs on it, and its policies are its own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from skipvar.config import EngineConfig, ModelSection, RunConfig
from skipvar.config_file import load_config
from skipvar.engine.build import build_engine
from skipvar.engine.trials import TrialRule
from skipvar.quality.similarity import psnr, ssim
from skipvar.skip.strategy import STRATEGY_NAMES
from skipvar.training.backgrounds import COLORS
from skipvar.types import Image, Request, Trial

REPOSITORY = Path(__file__).parents[2]
PROMPTS = {
    "a panda on blue": "blue",
    "four apples on yellow": "yellow",
    "a rocket on black": "black",
    "9 keys on pink": "pink",
}
"""Prompt to background."""


@pytest.fixture(scope="module")
def trials(make_request: Callable[..., Request]) -> dict[str, Trial]:
    """By prompt."""
    model = ModelSection(name="emoji", dtype="float32", device="cpu")
    config = RunConfig(model=model, policy="trials", engine=EngineConfig(batch_size=4, batch_invariant=False))
    engine = build_engine(config, rule=TrialRule(ssim, psnr, keeps_pixels=True))
    plain = {"cfg": (2.0,) * 10, "negative_prompt": None}
    engine.submit([make_request(i, prompt=prompt, **plain) for i, prompt in enumerate(PROMPTS)])
    made = [image for image in engine.drain() if isinstance(image, Image)]
    assert len(made) == len(PROMPTS)
    return {image.request.prompt: image.trial for image in made if image.trial is not None}


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
def test_background_is_the_one_asked_for(trials: dict[str, Trial], strategy: str) -> None:
    assert trials.keys() == PROMPTS.keys()
    for prompt, trial in trials.items():
        pixels = trial.pixels[strategy].astype(float)
        frame = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
        assert np.abs(np.median(frame, axis=0) - COLORS[PROMPTS[prompt]]).max() < 40, prompt


def test_less_work_is_farther_from_base(trials: dict[str, Trial]) -> None:
    base = np.stack([trial.pixels["base"] for trial in trials.values()])
    mean = {n: float(ssim(np.stack([t.pixels[n] for t in trials.values()]), base).mean()) for n in STRATEGY_NAMES}
    print(mean)
    assert mean["base"] == pytest.approx(1, abs=1e-4)
    assert 1 > mean["skip_1"] > mean["skip_2"] > mean["skip_3"] > 0.4
    assert mean["uncond_1"] > mean["skip_1"]


def test_default_policy_is_fitted_for_the_shipped_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    engine = build_engine(load_config("conf/emoji.yaml", ["model.device=cpu"]))
    assert engine.policy.name == "emoji_certified_0.84"
