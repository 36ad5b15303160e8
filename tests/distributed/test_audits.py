"""Audits of whole runs with a fake engine: the alarm acts, stands, and is told; another promise is refused."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import pytest
from fakes import build_drifted_engine, build_fake_engine

from skipvar.config import RunConfig
from skipvar.config_file import load_config
from skipvar.distributed.stopping import StopSignal
from skipvar.errors import ConfigError

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., RunConfig]:
    def make(on_alarm: Literal["warn", "base", "stop"], *overrides: str, num_prompts: int = 120) -> RunConfig:
        (tmp_path / "prompts.txt").write_text("\n".join(f"prompt {n}" for n in range(num_prompts)) + "\n")
        (tmp_path / "run.yaml").write_text(
            f"input: {{path: {tmp_path}/prompts.txt}}\n"
            f"output: {{path: {tmp_path}/out, unit_rows: 10}}\n"
            "model: {path: 'random:0', device: cpu}\n"
            "policy: spread\n"
            "cluster: {replicas: {max: 2}}\n"
            f"audit: {{fraction: 1, min_ssim: 0.8, alpha: 0.1, state: {tmp_path}/state, on_alarm: {on_alarm}}}\n"
        )
        return load_config(tmp_path / "run.yaml", overrides)

    return make


def run(config: RunConfig, factory: Any = build_drifted_engine) -> Any:
    from skipvar.distributed.generate import generate

    return generate(config, StopSignal(), factory)


def rows(config: RunConfig) -> list[dict[str, Any]]:
    files = sorted(Path(config.output.path).glob("data/*.parquet"))
    columns = ["position", "unit", "strategy", "policy", "audit_ssim"]
    return [row for file in files for row in pq.read_table(file, columns=columns).to_pylist()]


def record(config: RunConfig) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((Path(config.output.path) / "_run.json").read_text())
    return told


def test_under_base_what_is_handed_out_after_the_alarm_is_made_in_full(make_config: Callable[..., RunConfig]) -> None:
    overrides = ("cluster.replicas.max=1", "output.unit_rows=4")
    config = make_config("base", *overrides, num_prompts=400)  # most units wait when it rings, however busy the machine
    outcome = run(config)
    assert outcome.exit_code == 0
    policies = Counter((row["policy"], row["strategy"] == "base") for row in rows(config))
    assert policies["fixed:base", True] > 0 and policies["fixed:base", False] == 0 and policies["spread", False] > 0
    assert {row["unit"] for row in rows(config) if row["policy"] == "spread"} & {
        row["unit"] for row in rows(config) if row["policy"] == "fixed:base"
    } == set()
    state = record(config)["counts"]["audit_state"]
    audited = sum(row["audit_ssim"] is not None for row in rows(config))
    assert (state["images"], state["misses"]) == (audited, audited) and state["alarm"]["unit"] == 0
    assert all(row["audit_ssim"] is None for row in rows(config) if row["policy"] == "fixed:base")
    # the next night, with the same state, begins under base
    night = replace(config, output=replace(config.output, path=config.output.path + "2"))
    night = replace(night, sampling=replace(night.sampling, seed=7))
    assert run(night, build_fake_engine).exit_code == 0
    assert {(row["policy"], row["strategy"]) for row in rows(night)} == {("fixed:base", "base")}
    assert record(night)["counts"]["audit_state"]["alarm"] == state["alarm"]


def test_stop_ends_in_order_and_the_same_command_under_base_resumes(make_config: Callable[..., RunConfig]) -> None:
    overrides = ("cluster.replicas.max=1", "output.unit_rows=4")  # most units wait when it rings
    config = make_config("stop", *overrides, num_prompts=400)
    outcome = run(config)
    assert outcome.exit_code == 4 and "Audit alarm" in outcome.reason and "audit.on_alarm=base" in outcome.reason
    made = len(rows(config))
    assert 0 < made < 400 and record(config)["state"] == "stopped"
    again = run(config)
    assert again.exit_code == 4 and again.counts["session_images"] == 0 and len(rows(config)) == made
    resumed = run(make_config("base", *overrides, num_prompts=400))
    assert resumed.exit_code == 0
    assert sorted(row["position"] for row in rows(config)) == list(range(400))
    assert sum(row["policy"] == "spread" for row in rows(config)) == made
    assert resumed.counts["audit_state"]["images"] == made


def test_a_warning_changes_no_row(make_config: Callable[..., RunConfig]) -> None:
    from skipvar.distributed.outcome import summary

    config = make_config("warn")
    outcome = run(config)
    assert outcome.exit_code == 0 and {row["policy"] for row in rows(config)} == {"spread"}
    assert record(config)["counts"]["audit_state"]["images"] == 120
    assert "Audit alarm" in summary(outcome) and "100.0% under 0.8" in summary(outcome)
    with pytest.raises(ConfigError, match=r"another promise \(alpha: 0\.1 -> 0\.2\)"):
        run(make_config("warn", "audit.alpha=0.2", f"output.path={config.output.path}3"))
    assert not (Path(config.output.path + "3") / "_run.json").exists()
    before = record(config)
    with pytest.raises(ConfigError, match="another promise"):  # of a finished run as well, which stays finished
        run(make_config("warn", "audit.alpha=0.2"))
    assert record(config) == before and before["state"] == "finished"
