"""Audited runs that are killed at random and resumed, night after night: every audited image counts once."""

import json
import random
import time
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from faults.running import kill_tree, published, run, start, wait_for_units


def audited(output: Path) -> list[float]:
    """The SSIM of every audited image of a dataset."""
    files = sorted((output / "data").glob("*.parquet"))
    found = [score for file in files for score in pq.read_table(file, columns=["audit_ssim"])["audit_ssim"].to_pylist()]
    return [score for score in found if score is not None]


def killed_nights(
    tmp_path: Path,
    prompts: Path,
    *,
    num_nights: int,
    num_prompts: int,
    num_kills: int,
    environment: Mapping[str, str] | None = None,
) -> None:
    generator = random.Random(num_kills)
    state = tmp_path / "state"
    for night in range(num_nights):
        output = tmp_path / f"night-{night}"
        arguments = (
            f"input.path={prompts}", f"input.limit={num_prompts}", f"output.path={output}", f"sampling.seed={night}",
            "audit.fraction=0.6", "audit.min_ssim=0.8", "audit.alpha=0.3", f"audit.state={state}",
        )  # fmt: skip
        for _ in range(num_kills):
            process = start(*arguments, environment=environment)
            wait_for_units(output, min(len(published(output)) + 1, num_prompts // 4), process)
            time.sleep(generator.uniform(0.0, 1.5))
            kill_tree(process)
        code, said = run(*arguments, environment=environment)
        assert code == 0, said
        scores = [score for before in range(night + 1) for score in audited(tmp_path / f"night-{before}")]
        told = json.loads((output / "_run.json").read_text())["counts"]["audit_state"]
        assert (told["images"], told["misses"]) == (len(scores), sum(score < 0.8 for score in scores))
        assert told["runs"] == night + 1 and len(scores) > num_prompts / 4
    counted = [json.loads(file.read_text()) for file in state.glob("*/*.json")]
    assert sum(count["images"] for count in counted) == len(scores)


def test_two_nights_killed_once(tmp_path: Path, prompts: Path, on_cluster: dict[str, str]) -> None:
    """Here the driver alone dies: its cluster ends the replicas."""
    killed_nights(tmp_path, prompts, num_nights=2, num_prompts=16, num_kills=1, environment=on_cluster)


@pytest.mark.faults
def test_three_nights_killed_again_and_again(tmp_path: Path, prompts: Path) -> None:
    killed_nights(tmp_path, prompts, num_nights=3, num_prompts=120, num_kills=7)
