"""jobs.generate from the outside: files, exit codes, resume, signals, what it prints."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from skipvar.skip.strategy import STRATEGY_NAMES
from tests.jobs.conftest import REPOSITORY, generate_command


def rows(output: Path, columns: list[str]) -> dict[int, tuple]:
    """By position, over all data files."""
    found: dict[int, tuple] = {}
    for path in sorted((output / "data").glob("*.parquet")):
        for row in pq.read_table(path, columns=["position", *columns]).to_pylist():
            assert row["position"] not in found
            found[row["position"]] = tuple(str(row[column]) for column in columns)
    return found


def test_a_dozen_prompts_and_the_same_command_again(generate, tmp_path: Path) -> None:
    first = generate("input.limit=12", "cluster.address=local")
    assert first.returncode == 0, first.stderr
    output = tmp_path / "out"
    assert f"dataset: {output}" in first.stdout and "load_dataset" in first.stdout and "strategies:" in first.stdout
    assert "Traceback" not in first.stderr
    made = rows(output, ["prompt", "strategy", "seed"])
    assert sorted(made) == list(range(12))
    assert len({strategy for _, strategy, _ in made.values()}) >= 3
    with Image.open(output / "preview.png") as preview:
        assert preview.width > 8 * 128 and preview.height > 2 * 128
    record = json.loads((output / "_run.json").read_text())
    assert record["state"] == "finished" and (output / "_SUCCESS").exists()
    assert record["resolved"]["dtype"] == "float32" and record["counts"]["images"] == 12
    [log] = (output / "_log").glob("*-driver.log")
    assert "is up" in log.read_text()
    [device] = record["counts"]["devices"]
    assert device["self_check"]["is_invariant"] and device["batch_size"]["prefix"] > 0
    engine = record["counts"]["engine"]
    assert engine["images"] == 12 and set(engine["suffix"]) <= {*STRATEGY_NAMES} - {"skip_3"}

    again = generate("input.limit=12")  # on another Ray: where it runs is not what it makes
    assert again.returncode == 0, again.stderr
    assert rows(output, ["prompt", "strategy", "seed"]) == made
    other = generate("input.limit=12", "sampling.cfg=4")
    assert other.returncode == 2 and "sampling.cfg: 2.0 -> 4" in other.stderr and other.stderr.count("error:") == 1


def test_bad_rows_among_good_ones_are_error_rows(generate, tmp_path: Path) -> None:
    lines = [{"prompt": "an apple"}, {"prompt": ""}, {"prompt": "a car", "cfg": "much"}, {"prompt": "a dog", "own": 3}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    result = generate(f"input.path={tmp_path}/rows.jsonl")
    assert result.returncode == 3, result.stderr
    assert sorted(rows(tmp_path / "out", [])) == [0, 3]
    errors = [row for path in (tmp_path / "out" / "errors").iterdir() for row in pq.read_table(path).to_pylist()]
    assert sorted(row["position"] for row in errors) == [1, 2, 4]
    assert {row["error_class"] for row in errors} == {"RowError"}
    assert "3 now, 3 in all" in result.stdout


def test_sigterm_ends_in_order_and_resumes_to_the_same_images(generate, tmp_path: Path) -> None:
    command = generate_command(tmp_path / "out", "input.limit=40", "engine.batch_size=2", "engine.pool_images=8")
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and not list((tmp_path / "out" / "data").glob("*.parquet")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 4, err
    assert "SIGTERM" in out and "Traceback" not in err
    assert json.loads((tmp_path / "out" / "_run.json").read_text())["state"] == "stopped"
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "data").iterdir()}
    assert 0 < len(before) < 10
    resumed = generate("input.limit=40")  # other batch sizes change no image
    assert resumed.returncode == 0, resumed.stderr
    assert sorted(rows(tmp_path / "out", [])) == list(range(40))
    assert all((tmp_path / "out" / "data" / name).read_bytes() == data for name, data in before.items())


def test_dry_run_and_print_config_write_nothing(generate, tmp_path: Path) -> None:
    dry = generate("--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "prompts: 96" in dry.stdout and "skip_3" in dry.stdout and "estimated time" in dry.stdout
    printed = generate("--print-config")
    assert printed.returncode == 0 and "unit_rows: 4" in printed.stdout
    assert not (tmp_path / "out").exists()


def test_a_missing_gpu_is_told_in_one_sentence(generate, tmp_path: Path) -> None:
    result = generate("model.device=cuda", "cluster.address=local")  # a cluster may get one yet
    if result.returncode == 0:
        pytest.skip("this machine has a GPU")
    assert result.returncode == 2
    assert result.stderr.count("error:") == 1 and "model.device" in result.stderr and "Traceback" not in result.stderr
