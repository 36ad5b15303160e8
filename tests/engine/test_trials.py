"""A trial's images are those that the slow twin makes under each strategy."""

from collections.abc import Callable

import numpy as np

from skipvar.config import ModelSection
from skipvar.engine.sampler import SamplingRules
from skipvar.engine.trials import make_trials
from skipvar.engine.twin import generate_one
from skipvar.model.pipeline import load_pipeline
from skipvar.skip.strategy import STRATEGY_NAMES
from skipvar.types import Request


def test_trials_agree_with_single_runs(make_request: Callable[..., Request]) -> None:
    pipeline = load_pipeline(ModelSection(name="emoji", path="random:0", dtype="float32", device="cpu"))
    requests = [make_request(position) for position in range(3)]
    trials = list(make_trials(pipeline, SamplingRules(), requests, grid_scales=(4, 9), batch_size=2))
    assert [trial.request for trial in trials] == requests
    for name in STRATEGY_NAMES:
        twin = generate_one(pipeline, requests[2], name)
        assert np.array_equal(trials[2].pixels[name], twin.pixels), name
    assert set(trials[0].probes) == {4, 9} and trials[0].probes[4] != trials[0].probes[9]
