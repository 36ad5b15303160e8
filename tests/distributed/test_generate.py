"""Whole runs on a real local Ray with a fake engine: what is lost is made again, every request accounted for once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fakes import (
    build_dying_engine,
    build_fake_engine,
    build_forgiving_engine,
    build_no_engine,
    build_slow_engine,
)

from skipvar.config import RunConfig
from skipvar.config_file import load_config
from skipvar.distributed.stopping import StopSignal
from skipvar.errors import ConfigError, ModelError
from skipvar.local import build_local_engine
from skipvar.model import device

EMOJI = Path(__file__).parents[2] / "skipvar" / "assets" / "emoji"

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def make_config(tmp_path: Path):
    def make(prompts: list[str], *overrides: str) -> RunConfig:
        (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
        (tmp_path / "run.yaml").write_text(
            f"input: {{path: {tmp_path}/prompts.txt}}\n"
            f"output: {{path: {tmp_path}/out, unit_rows: 10}}\n"
            "model: {path: 'random:0', device: cpu}\n"
            "cluster: {replicas: {max: 2}}\n"
        )
        return load_config(tmp_path / "run.yaml", overrides)

    return make


def run(config: RunConfig, factory: Any = build_fake_engine, stop: Any = None) -> Any:
    from skipvar.distributed.generate import generate

    return generate(config, stop or StopSignal(), factory)


def published(config: RunConfig) -> tuple[list[int], dict[int, str]]:
    """Positions in the data files, and those in the error files that count with their error classes."""
    output = Path(config.output.path)
    data, errors = [], {}
    for path in sorted((output / "data").glob("*.parquet")):
        table = pq.read_table(path)
        data += table.column("position").to_pylist()
        named = (pq.read_metadata(path).metadata or {}).get(b"skipvar.errors", b"").decode()
        if named:
            rows = pq.read_table(output / named).to_pylist()
            errors |= {row["position"]: row["error_class"] for row in rows}
    return data, errors


def left_in(config: RunConfig) -> list[str]:
    """What lies in the output, but for the empty folder of temporary files."""
    return [path.name for path in Path(config.output.path).rglob("*") if path.name != "_tmp"]


def state_of(config: RunConfig) -> str:
    return str(json.loads((Path(config.output.path) / "_run.json").read_text())["state"])


def test_a_whole_run(make_config) -> None:
    config = make_config([f"prompt {n}" for n in range(95)])
    outcome = run(config)
    assert (outcome.exit_code, outcome.state) == (0, "finished")
    data, errors = published(config)
    assert sorted(data) == list(range(95)) and not errors
    assert outcome.counts["images"] == 95
    assert (Path(config.output.path) / "_SUCCESS").exists()
    assert (Path(config.output.path) / "preview.png").exists()
    assert list((Path(config.output.path) / "_log").glob("*-driver.log"))


def test_a_second_run_has_nothing_to_do(make_config) -> None:
    config = make_config([f"prompt {n}" for n in range(15)])
    first, second = run(config), run(config, build_no_engine)  # no replica is started
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert second.counts["session_images"] == 0
    assert second.counts["images"] == 15


def test_what_a_record_tells_of_engines_may_be_unreadable(make_config, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config([f"prompt {n}" for n in range(15)])
    first = run(config)
    record = Path(config.output.path) / "_run.json"
    content = json.loads(record.read_text())
    content["counts"]["engine"] = {"images": 3}
    record.write_text(json.dumps(content))
    second = run(config, build_no_engine)
    assert (first.exit_code, second.exit_code) == (0, 0) and second.counts["engine"] is None
    assert "cannot be read: it is left out" in caplog.text


def test_failed_requests_are_error_rows(make_config) -> None:
    config = make_config([f"fail {n}" if n % 10 == 3 else f"prompt {n}" for n in range(40)])
    outcome = run(config)
    assert (outcome.exit_code, outcome.state) == (3, "finished_with_errors")
    data, errors = published(config)
    assert sorted(errors) == [3, 13, 23, 33]
    assert sorted(data + list(errors)) == list(range(40))
    assert run(config).exit_code == 3  # the errors of an earlier session count too


def test_a_request_that_kills_its_replica_becomes_an_error_row(make_config) -> None:
    prompts = [f"die {n}" if n == 6 else f"prompt {n}" for n in range(12)]
    config = make_config(prompts, "max_attempts=1", "output.unit_rows=4")
    outcome = run(config)
    assert outcome.exit_code == 3
    data, errors = published(config)
    assert errors == {6: "ReplicaDiedError"}
    assert sorted([*data, 6]) == list(range(12))


def test_a_broken_engine_is_replaced(make_config) -> None:
    config = make_config(["a", "raise"], "max_attempts=1")
    outcome = run(config)
    assert outcome.exit_code == 3
    assert published(config)[1] == {1: "ReplicaDiedError"}


def test_a_killed_replica_costs_no_row(make_config) -> None:
    config = make_config([f"prompt {n}" for n in range(200)])

    def kill_one() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if len(list((Path(config.output.path) / "data").glob("*"))) >= 3:
                break
            time.sleep(0.05)
        os.kill(int((Path(config.input.path).parent / "process").read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    outcome = run(config, build_slow_engine)
    killer.join()
    assert outcome.exit_code == 0
    counts = Counter(published(config)[0])
    assert sorted(counts) == list(range(200)) and set(counts.values()) == {1}


def test_stopping_leaves_whole_units_and_the_same_command_resumes(make_config) -> None:
    config = make_config([f"prompt {n}" for n in range(1000)])
    stop = StopSignal()

    def stop_soon() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not list((Path(config.output.path) / "data").glob("*")):
            time.sleep(0.05)
        stop.stop("a test")

    stopper = threading.Thread(target=stop_soon)
    stopper.start()
    outcome = run(config, build_slow_engine, stop)
    stopper.join()
    assert (outcome.exit_code, state_of(config)) == (4, "stopped")
    assert "a test" in outcome.reason
    data, _ = published(config)
    assert 0 < len(data) < 1000 and len(data) % 10 == 0
    assert not list((Path(config.output.path) / "_tmp").glob("*"))
    assert run(config).exit_code == 0
    assert sorted(published(config)[0]) == list(range(1000))


def test_a_run_whose_output_was_taken_over_leaves_its_books_to_the_other(make_config) -> None:
    config = make_config([f"prompt {n}" for n in range(1000)], "storage.lease_stale_seconds=1")
    output = Path(config.output.path)

    def take_over() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not list((output / "data").glob("*")):
            time.sleep(0.05)
        (output / "_lease" / "000000099.json").write_text("{}")

    other = threading.Thread(target=take_over)
    other.start()
    outcome = run(config, build_slow_engine)
    other.join()
    assert outcome.exit_code == 4 and "took over this output" in outcome.reason
    assert state_of(config) == "running" and not (output / "report.html").exists()


def test_time_is_up(make_config) -> None:
    config = make_config([f"prompt {n}" for n in range(1000)])
    stop = StopSignal()

    stop.stop_after(8)
    outcome = run(config, build_slow_engine, stop)
    assert (outcome.exit_code, state_of(config)) == (4, "stopped")
    assert "max_seconds (8) is over" in outcome.reason
    outcome = run(replace(config, max_seconds=0.001))
    assert outcome.exit_code == 4 and "max_seconds" in outcome.reason


def test_too_many_failures_end_the_run(make_config) -> None:
    config = make_config(["fail"] * 300, "max_error_share=0.5")
    outcome = run(config, build_slow_engine)
    assert outcome.exit_code == 4
    assert "max_error_share" in outcome.reason


def test_retried_errors_are_published_beside(make_config) -> None:
    config = make_config([f"fail {n}" if n in (3, 12) else f"prompt {n}" for n in range(20)])
    assert run(config).exit_code == 3
    outcome = run(replace(config, retry_errors=True), build_forgiving_engine)
    assert outcome.exit_code == 0
    assert sorted(published(config)[0]) == list(range(20))


def test_a_changed_setting_is_refused(make_config) -> None:
    config = make_config([f"prompt {n}" for n in range(10)])
    assert run(config).exit_code == 0
    changed = replace(config, sampling=replace(config.sampling, cfg=4.0))
    with pytest.raises(ConfigError, match=r"sampling\.cfg: 3\.0 -> 4\.0"):
        run(changed)
    assert run(replace(config, engine=replace(config.engine, batch_size=3))).exit_code == 0


def test_a_run_that_resolves_otherwise_is_refused(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config([f"prompt {n}" for n in range(10)], "model.dtype=auto")
    monkeypatch.setattr(device, "_cpu_flags", lambda: frozenset({"amx_bf16"}))
    assert run(config).exit_code == 0
    record = json.loads((Path(config.output.path) / "_run.json").read_text())
    assert record["resolved"]["dtype"] == record["parts"]["model"]["dtype"] == "bfloat16"
    monkeypatch.setattr(device, "_cpu_flags", lambda: frozenset({"avx2"}))
    with pytest.raises(ConfigError, match=r'model\.dtype: "bfloat16" -> "float32"'):
        run(config)
    assert run(replace(config, model=replace(config.model, dtype="bfloat16"))).exit_code == 0


def test_the_path_holds_date_and_fingerprint(make_config, tmp_path: Path) -> None:
    config = make_config(["a"], f"output.path={tmp_path}/{{date}}/{{fingerprint}}")
    outcome = run(config)
    record = json.loads((Path(outcome.output) / "_run.json").read_text())
    assert Path(outcome.output).name == record["fingerprint"]
    assert len(Path(outcome.output).parent.name) == len("2026-01-31")


def test_a_model_that_cannot_be_loaded_ends_the_run_with_its_sentence(make_config) -> None:
    config = make_config(["a"])
    with pytest.raises(ModelError, match="no weights there"):
        run(config, build_no_engine)
    assert left_in(config) == []
    right = replace(config, model=replace(config.model, path="random:1"))  # nothing was made: the output is free
    assert run(right).exit_code == 0


def test_truncated_weights_end_the_run_at_once_with_their_name(make_config, tmp_path: Path) -> None:
    shutil.copytree(EMOJI, tmp_path / "model")
    weights = tmp_path / "model" / "transformer.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    config = make_config(["a"], f"model.path={tmp_path}/model")
    with pytest.raises(ModelError, match=f"{weights}: .*the file is cut off or damaged"):
        run(config, build_local_engine)
    assert left_in(config) == []


def test_replicas_that_never_come_up_end_the_run(make_config) -> None:
    outcome = run(make_config(["a"], "max_attempts=2"), build_dying_engine)
    assert outcome.exit_code == 4 and "replicas in a row died" in outcome.reason


def test_ray_data_reads_a_finished_dataset(make_config) -> None:
    """In a Ray of its own: a run's local one has next to no object store, which Ray Data needs."""
    config = make_config([f"prompt {n}" for n in range(25)])
    assert run(config).exit_code == 0
    script = (
        "import sys, ray; ray.init(address='local', num_cpus=2, include_dashboard=False, logging_level='ERROR')\n"
        "rows = ray.data.read_parquet(sys.argv[1]).take_all()\n"
        "assert all(row['image']['bytes'][:4] == b'\\x89PNG' for row in rows)\n"
        "print(sorted(row['position'] for row in rows))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", script, f"{config.output.path}/data"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert said.stdout.strip().splitlines()[-1:] == [str(list(range(25)))], said.stderr[-2000:]


def test_the_end_of_the_budget_is_resumable_and_counts_all_sessions(make_config) -> None:
    prompts = [f"prompt {n}" for n in range(200)]
    price = "budget.usd_per_replica_hour=3600"
    first = run(make_config(prompts, price, "budget.max_usd=2"), build_slow_engine)
    assert first.exit_code == 4 and "budget.max_usd (2)" in str(first.reason)
    spent = first.counts["cost"]["usd"]
    assert spent >= 2
    again = run(make_config(prompts, price, "budget.max_usd=2"), build_slow_engine)
    assert again.exit_code == 4 and again.counts["session_images"] <= first.counts["session_images"]
    config = make_config(prompts, price, "budget.max_usd=1000")
    last = run(config)
    assert last.exit_code == 0 and last.counts["cost"]["usd"] > spent
    record = json.loads((Path(config.output.path) / "_run.json").read_text())
    assert record["counts"]["cost"] == last.counts["cost"]
    from skipvar.distributed.outcome import summary

    assert "cost: " in summary(last)
