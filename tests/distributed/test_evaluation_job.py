"""`jobs.evaluate` as a whole, on the Ray of these tests."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from skipvar.cli.evaluate import main

pytestmark = pytest.mark.usefixtures("local_ray")


def test_the_job_ends_in_a_table_and_one_line_of_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A real run with random weights: trials on Ray, every file; the clock has its own test."""
    for name in ("mixed", "plain"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{count} {name} apples\n" for count in range(4)))
    overrides = ["model.path=random:0", "model.device=cpu", "cluster.replicas.max=1"]
    overrides.append(f"output.path={tmp_path}/trials-{{fingerprint}}")
    sets = [f"{name}={tmp_path}/{name}.txt" for name in ("mixed", "plain")]
    policy = str(Path(__file__).parents[2] / "conf/policies/emoji_0.86.json")
    arguments = ["--sets", *sets, "--policies", policy, "--timed", "0", "--out", str(tmp_path / "out")]
    assert main(["conf/calibrate.yaml", *overrides, "policy_force=true", *arguments]) == 0
    verdict = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (verdict["policy"], verdict["set"], verdict["images"], verdict["alpha"]) == ("emoji_0.86", "mixed", 4, None)
    assert verdict["speedup_token_forwards"] >= 1 and "above_fixed_hull" in verdict
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"evaluation.md", "evaluation.json", "images.parquet", "pareto.svg", "pareto.png"}
    assert pq.read_metadata(tmp_path / "out" / "images.parquet").num_rows == 2 * 4 * 11
