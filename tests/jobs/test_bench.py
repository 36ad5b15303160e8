"""jobs.bench ends with one JSON document that holds what it claims."""

import json

import pytest

from jobs.bench import main


def test_planning_in_little_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--rows", "300000"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for kind in ("parquet", "txt"):
        assert result[kind]["rows"] == 300_000
        assert result[kind]["peak_bytes"] < 300e6


def test_engine_against_its_slow_twin(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["model.path=random:0", "policy=spread", "model.device=cpu"]
    arguments = [*model, "engine.batch_size=4", "--images", "4", "--rounds", "1"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["images"] == 4
    assert set(result["images_per_second"]) == {"twin", "batched", "engine"}
    assert result["ratio"] > 0


def test_a_bad_configuration_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sampling.cgf=3"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_drivers_own_cost_is_small() -> None:
    from skipvar.benchmarks.driver import measure_driver

    result = measure_driver(50, 2000, 4.0, show=lambda _: None)
    assert result["units_per_second"] > 2000 and result["lost_share"] < 0.01
    assert result["peak_bytes"] < 20_000_000


@pytest.mark.faults
def test_the_cost_of_rays_calls_with_real_actors() -> None:
    from skipvar.benchmarks.ray_calls import measure_calls

    cost = measure_calls(2, 300)
    assert 75 <= cost.calls < 1000 and 0 < cost.driver_seconds < 60 and cost.units_per_second > 10
