"""The harness on made-up trials: hull, misses and headline are what a person would work out by hand."""

import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from skipvar.cli.evaluate import main
from skipvar.config import InputConfig, ModelSection, RunConfig
from skipvar.engine.engine import Engine
from skipvar.engine.resolved import Resolved
from skipvar.local import build_local_engine
from skipvar.model.pipeline import Pipeline
from skipvar.quality.evaluate import choices, evaluate, image_table
from skipvar.quality.results import draw, markdown, write
from skipvar.quality.speed import Speed, measure_speeds, spread_requests
from skipvar.skip.policy import Decision, SpreadPolicy
from skipvar.skip.strategy import CHANGED_SCALES, STRATEGY_NAMES
from skipvar.skip.tally import best_value, cheapest
from skipvar.types import Probe, Request, Trial

COSTS = {name: 100.0 - 25 * skipped - 10 * halved for name, (skipped, halved) in CHANGED_SCALES.items()}


class Knowing(SpreadPolicy):
    """Skips three scales where the probe says that the image is plain, else none."""

    def decide(self, request: Request, numbers: Sequence[float]) -> Decision:
        return Decision("skip_3" if numbers[0] < 0.5 else "base")


def trials(count: int) -> list[Trial]:
    made = []
    for place in range(count):
        is_fine = place % 2
        loss = {name: (0.1 if is_fine else 0.01) * (100 - COSTS[name]) / 75 for name in STRATEGY_NAMES}
        probe = Probe(sobel_change=float(is_fine), fft_high_frequency_ratio=0.1)
        ssim = {name: 1 - lost for name, lost in loss.items()}
        psnr = {name: None if name == "base" else 30.0 for name in STRATEGY_NAMES}
        lpips = None if place % 4 else dict.fromkeys(STRATEGY_NAMES, 0.5)
        made.append(Trial(probes={4: probe}, ssim=ssim, prompt=f"p{place}", psnr=psnr, lpips=lpips))
    return made


def test_the_hull_is_that_of_all_mixtures() -> None:
    points = [(0.2, 0.80), (0.5, 0.82), (0.6, 0.95), (1.0, 1.0)]
    assert best_value(points, 0.4) == pytest.approx(0.875), "(0.5, 0.82) lies below the line"
    assert best_value(points, 0.6) == 0.95 and best_value(points, 0.2) == 0.80
    misses = [(0.2, 0.5), (0.6, 0.4), (1.0, 0.0)]
    assert cheapest(misses, 0.25) == pytest.approx(0.6) and cheapest(misses, 0.0) == 1.0
    assert cheapest(misses, 0.6) == 0.2


def test_a_policy_that_knows_is_above_the_hull_and_fixed_ones_lie_on_or_under_it(
    make_request: type, tmp_path: Path
) -> None:
    policy = Knowing(decision_scale=6, name="knowing", content_hash="knowing")
    sets = {"mixed": trials(40), "plain": trials(1)}
    chosen = {name: choices([policy], of_set, make_request(0)) for name, of_set in sets.items()}
    rows = evaluate(sets, chosen, 0.95, COSTS, {"knowing": Speed(2.0, 1.0, 1.5, 1.6)})
    assert len(rows) == 2 * 12
    found = {(row.set, row.policy): row for row in rows}
    knowing = found["mixed", "knowing"]
    assert knowing.mean_ssim == pytest.approx(0.995) and knowing.share_under_floor == 0
    assert knowing.token_forwards_share == pytest.approx(0.625)
    assert knowing.above_fixed_hull == pytest.approx(0.0225, abs=1e-4)
    # base, and skip_3 for one image in eleven, have the same mean
    assert knowing.saved_at_equal_ssim == pytest.approx(1 - 62.5 / (100 - 75 * 0.005 / 0.055), abs=1e-4)
    oracle = found["mixed", "oracle"]
    assert oracle.share_under_floor == 0 and oracle.strategies == {"skip_1_uncond_1": 20, "skip_3": 20}
    assert oracle.saved_at_equal_misses == pytest.approx(1 - (25 + 65) / 2 / 65, abs=1e-4)
    # no fixed strategy that costs less than skip_1_uncond_1 (65) misses nothing
    assert knowing.saved_at_equal_misses == pytest.approx(1 - 62.5 / 65, abs=1e-4)
    assert found["mixed", "skip_3"].share_under_floor == 0.5
    low, high = found["mixed", "skip_3"].interval
    assert low < 0.5 < high and found["mixed", "base"].mean_psnr is None
    assert found["mixed", "skip_3"].mean_lpips == 0.5
    assert all(row.above_fixed_hull <= 1e-4 for row in rows if row.is_fixed)
    assert knowing.speed is not None and knowing.to_dict()["speedup"] == 1.6 and "speedup" not in oracle.to_dict()
    text = markdown(rows, "infinity_2b")
    assert "| 1.50 x | 1.60 x |" in text and text.count("| – | – |") == 2 * 11
    assert "## mixed: 40 prompts" in text and "| FastVAR, as the paper measures it | 2.53 x | 0.692 |" in text
    assert "FastVAR" not in markdown(rows, "emoji")
    assert [path.stat().st_size > 5000 for path in draw(rows, tmp_path)] == [True, True]
    images = image_table(sets, chosen, COSTS)
    assert len(images) == 41 * 11
    mine = [row["ssim"] for row in images.to_pylist() if (row["set"], row["policy"]) == ("mixed", "knowing")]
    assert np.mean(mine) == pytest.approx(knowing.mean_ssim)
    write(tmp_path, rows, images, text)
    assert json.loads((tmp_path / "evaluation.json").read_text())[0]["set"] == "mixed"
    assert pq.read_table(tmp_path / "images.parquet") == images
    assert (tmp_path / "evaluation.md").read_text() == text


def test_sets_without_a_name_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conf/calibrate.yaml", "--sets", "=x.txt"]) == 2
    assert "--sets" in capsys.readouterr().err


def test_the_clock_runs_every_policy_alone_and_in_full_batches(
    run_config: Callable[..., RunConfig], make_request: Callable[..., Request]
) -> None:
    built = []
    living: weakref.WeakSet[Engine] = weakref.WeakSet()

    def build(config: RunConfig, resolved: Resolved, pipeline: Pipeline | None) -> Engine:
        assert (pipeline is None) == (not built), "the model is loaded once"
        assert not living, "each engine plans with all the memory there is"
        built.append((config.policy, resolved.batch_size))
        engine = build_local_engine(config, resolved, pipeline)
        living.add(engine)
        return engine

    requests = [make_request(position) for position in range(2)]
    specs = {"base": "fixed:base", "skip_3": "fixed:skip_3"}
    speeds = measure_speeds(run_config("spread", batch_size=2), specs, requests, 1, build)
    assert built == [("fixed:base", 1), ("fixed:base", 2), ("fixed:skip_3", 1), ("fixed:skip_3", 2)]
    assert speeds.keys() == specs.keys() and all(one.seconds_one > 0 and one.seconds > 0 for one in speeds.values())
    assert (speeds["base"].speedup_one, speeds["base"].speedup) == (1, 1)


def test_requests_for_the_clock_do_without_the_model(tmp_path: Path) -> None:
    """Its folder may lie on S3, where `made.resolved` was read from."""
    (tmp_path / "prompts.txt").write_text("".join(f"{count} apples\n" for count in range(9)))
    config = RunConfig(
        input=InputConfig(path=f"{tmp_path}/prompts.txt"), model=ModelSection(path="s3://nowhere/model", name="emoji")
    )
    found = spread_requests(config, num_scales=10, count=3)
    assert [request.prompt for request in found] == ["0 apples", "3 apples", "6 apples"]
    assert all(len(request.cfg) == 10 for request in found)
