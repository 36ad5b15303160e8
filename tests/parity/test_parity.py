"""Parity passes on golden data, and fails on anything that is off."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from generated.calling import call
from safetensors.torch import load_file, save_file
from torch import Tensor

from skipvar.cli.parity import main
from skipvar.errors import InputError
from skipvar.model.allocator import keep_freed_memory
from skipvar.parity.case import Case
from skipvar.parity.compare import compare_bits
from skipvar.parity.golden import GoldenPart
from skipvar.parity.replay import Replay
from skipvar.parity.run import Report, run_parity
from skipvar.parity.runs import known_bits
from skipvar.skip.strategy import Mode

REPOSITORY = Path(__file__).parents[2]
COMMITTED = REPOSITORY / "tests" / "golden"
WHOLE = REPOSITORY.parent / "shared" / "golden"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(COMMITTED, id="committed"),
        pytest.param(
            WHOLE,
            id="whole",
            marks=[pytest.mark.faults, pytest.mark.skipif(not WHOLE.is_dir(), reason=f"{WHOLE} is not there")],
        ),
    ],
)
def report(request: pytest.FixtureRequest) -> Report:
    keep_freed_memory()
    return run_parity(request.param)


def test_everything_passes(report: Report) -> None:
    summary = report.summary()
    print(summary)
    assert report.passed, "\n".join(case.line for case in report.cases if not case.passed)
    assert summary["cases"] == summary["passed"] >= 50
    assert 0 < summary["worst_logit_error"] < 2e-4


def test_every_kind_of_case_is_there(report: Report) -> None:
    names = [case.name for case in report.cases]
    strategies = ["base", "skip1", "skip2", "skip3", "uncond1", "uncond2", "uncond3"]
    expected = ["schedules/1.0", "rope/1.25", "decisions/ssim_84", "decisions/ssim_88", "main/intermediates"]
    expected += [f"main/runs/s_{strategy}" for strategy in strategies]
    expected += [f"main/skip_checks/{strategy}" for strategy in strategies]
    expected += ["main/probes/0", "patchify/probes/1", "patchify/runs/a_p0", "main/runs/f_1M_p0_cfg4_tau05"]
    assert set(expected) <= set(names)
    assert sum(name.startswith("main/batch/") for name in names) == 2


def test_the_committed_part_is_small_enough() -> None:
    assert sum(path.stat().st_size for path in COMMITTED.rglob("*") if path.is_file()) <= 16_000_000


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The smaller part of the committed set, and the tables, to spoil."""
    folder = tmp_path / "golden"
    shutil.copytree(COMMITTED / "patchify", folder / "patchify")
    for name in ("decision_models.json", "schedules.json", "rope.json", "rope.safetensors"):
        shutil.copyfile(COMMITTED / name, folder / name)
    return folder


def failed(folder: Path) -> set[str]:
    return {case.name for case in run_parity(folder).cases if not case.passed}


def change_tensor(path: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(path)
    tensors[name] = change(tensors[name].clone()).contiguous()
    save_file(tensors, path)


def change_json(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_the_copy_passes(copy: Path) -> None:
    assert failed(copy) == set()


def test_a_perturbed_weight_fails(copy: Path) -> None:
    weights = copy / "patchify" / "transformer.safetensors"
    change_tensor(weights, "block_chunks.1.module.0.ffn.fc2.weight", lambda weight: weight * 1.02)
    assert {"patchify/runs/a_p0", "patchify/runs/c_hw0666_p0"} <= failed(copy)


def test_a_perturbed_decoder_fails(copy: Path) -> None:
    change_tensor(
        copy / "patchify" / "vae.safetensors", "vae.decoder.conv_out.conv.weight", lambda weight: weight * 1.05
    )
    assert {"patchify/runs/a_p0", "patchify/probes/0", "patchify/probes/1"} <= failed(copy)


@pytest.mark.parametrize("scale", [0, 6])
def test_a_flipped_bit_fails(copy: Path, scale: int) -> None:
    def flip(packed: Tensor) -> Tensor:
        packed[-1, -1] ^= 1
        return packed

    change_tensor(copy / "patchify" / "runs" / "a_p0.safetensors", f"bits_packed_{scale:02}", flip)
    assert failed(copy) == {"patchify/runs/a_p0"}


def test_a_flipped_bit_fails_where_golden_bits_are_fed_back(copy: Path) -> None:
    def flip(packed: Tensor) -> Tensor:
        packed[5, 0] ^= 64
        return packed

    run = copy / "patchify" / "runs" / "a_p0"
    change_json(run.with_suffix(".json"), lambda content: content["scales"][3].update(min_margin=1e-6))
    assert failed(copy) == set()
    change_tensor(run.with_suffix(".safetensors"), "bits_packed_03", flip)
    assert failed(copy) == {"patchify/runs/a_p0"}


def test_a_bit_may_differ_only_at_its_threshold_and_only_with_bits_fed_back() -> None:
    logits = torch.tensor([[0.0, 5e-5, 0.0, 5.0]])
    replay = Replay(logits=[logits], bits=[torch.tensor([[True, True]])], thresholds=[torch.zeros(1, 2)])

    def problems(golden: list[bool], *, is_free: bool) -> list[str]:
        case = Case("")
        compare_bits(case, replay, 0, torch.tensor([golden]), is_free=is_free)
        return case.problems

    assert not problems([True, True], is_free=True)
    assert not problems([False, True], is_free=False)
    assert problems([False, True], is_free=True)
    assert problems([True, False], is_free=False)
    assert problems([False, False], is_free=False)


def test_wrong_numbers_fail(copy: Path) -> None:
    def probes(content: list) -> None:
        content[0]["sobel_l1_difference"] *= 1.0005
        content[1]["natural_decision"]["ssim_86"] = "skip3"

    change_json(copy / "patchify" / "probes.json", probes)  # type: ignore[arg-type]
    change_json(copy / "schedules.json", lambda content: content["1.5"][4].__setitem__(1, 8))
    change_json(copy / "rope.json", lambda content: content["1.25"].update(tokens=10773))
    change_tensor(copy / "rope.safetensors", "sin_hd128_1.0", lambda table: table + 1e-3)
    table = ("golden_table", "predictions", "ssim_88", "strategy")

    def decisions(content: dict) -> None:
        for key in table[:-1]:
            content = content[key]
        content[table[-1]][17] = "base"

    change_json(copy / "decision_models.json", decisions)
    change_tensor(copy / "patchify" / "runs" / "a_p0.safetensors", "image_bgr_crop_tl", lambda image: image ^ 2)
    assert failed(copy) == {
        *("patchify/probes/0", "patchify/probes/1", "schedules/1.5", "rope/1.25", "rope/1.0", "decisions/ssim_88"),
        "patchify/runs/a_p0",
    }


def test_numbers_that_are_none_fail(copy: Path) -> None:
    change_tensor(copy / "patchify" / "runs" / "a_p0.safetensors", "logits_02", lambda logits: logits / 0)
    report = run_parity(copy)
    assert [case.name for case in report.cases if not case.passed] == ["patchify/runs/a_p0"]
    json.dumps(report.summary(), allow_nan=False)


def test_other_names_and_fewer_files(copy: Path) -> None:
    part = copy / "something"
    (copy / "patchify").rename(part)
    for suffix in ("json", "safetensors"):
        (part / "runs" / f"a_p0.{suffix}").rename(part / "runs" / f"z-9.{suffix}")
        (part / "runs" / f"c_hw0666_p0.{suffix}").unlink()
        (part / f"probes.{suffix}").unlink()
    for name in ("decision_models.json", "schedules.json", "rope.json"):
        (copy / name).unlink()
    report = run_parity(copy)
    assert report.passed and [case.name for case in report.cases] == ["something/runs/z-9"]


def test_absent_weights_fail_every_run_with_the_file_named(copy: Path) -> None:
    (copy / "patchify" / "transformer.safetensors").unlink()
    problems = [problem for case in run_parity(copy).cases for problem in case.problems]
    assert len(problems) == 4 and all("transformer.safetensors" in problem for problem in problems)


def test_forced_runs_are_mapped_by_the_scales_that_ran() -> None:
    runs = {run.name: run for run in GoldenPart(COMMITTED / "main").runs()}
    modes = {name: runs[f"s_{name}"].strategy().modes for name in ("base", "skip2", "uncond3")}
    assert modes["base"] == (Mode.GUIDED,) * 13
    assert modes["skip2"] == (Mode.GUIDED,) * 11 + (Mode.SKIPPED,) * 2
    assert modes["uncond3"] == (Mode.GUIDED,) * 10 + (Mode.CONDITIONAL,) * 3
    assert sorted(runs["s_skip2"].bits) == [10]
    assert list(known_bits(runs["s_skip2"], list(runs.values()))) == list(range(11))


@pytest.mark.skipif(not WHOLE.is_dir(), reason="the whole golden set is not beside the repository")
def test_forced_runs_of_twelve_scales() -> None:
    runs = {run.name: run for run in GoldenPart(WHOLE / "main").runs()}
    modes = {name: runs[f"t_060M_{name}"].strategy().modes for name in ("skip1", "skip2", "uncond2")}
    assert modes["skip1"] == (Mode.GUIDED,) * 12
    assert modes["skip2"] == (Mode.GUIDED,) * 11 + (Mode.SKIPPED,)
    assert modes["uncond2"] == (Mode.GUIDED,) * 11 + (Mode.CONDITIONAL,)


def command(*arguments: object) -> "subprocess.CompletedProcess[str]":
    names = [str(argument) for argument in arguments]
    return subprocess.run([sys.executable, "-m", "jobs.parity", *names], cwd=REPOSITORY, capture_output=True, text=True)


def test_the_command(copy: Path) -> None:
    done = command(copy, "--json")
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    assert json.loads(done.stdout)["passed"] == json.loads(done.stdout)["cases"]
    change_tensor(copy / "patchify" / "runs" / "a_p0.safetensors", "logits_03", lambda logits: logits + 2e-3)
    done = command(copy)
    assert done.returncode == 1 and "FAILED  patchify/runs/a_p0" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == ["patchify/runs/a_p0"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("schedules.json", "[" * 100_000),
        ("rope.json", "[[1]]"),
        ("decision_models.json", '{"models": {"ssim_84": [], "cases": 3}}'),
        ("schedules.json", '{"1.0": [[1, 1]], "x": 5}'),
        ("main/runs/a.json", '{"spec": []}'),
        ("main/runs/a.json", "[" * 100_000),
        ("main/probes.json", "[1]"),
    ],
)
def test_damaged_golden_data_is_a_sentence_or_a_verdict(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "main" / "runs").mkdir(parents=True)
    (tmp_path / "main" / "config.json").write_text("{}")
    (tmp_path / "rope.json").write_text("{}")
    (tmp_path / name).write_text(text)
    said = call(main, str(tmp_path), "--json")
    assert said.code in (1, 2) and "Traceback" not in said.err
    assert said.code == 1 or (said.err.startswith("error: ") and said.err.count("\n") == 1), said


@pytest.mark.parametrize("content", [None, {}, {"main/notes.txt": "x"}, {"main/config.json": "{}"}])
def test_folders_that_are_none(content: dict | None, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name, text in (content or {}).items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    with pytest.raises(InputError, match="folder"):
        run_parity(folder)


def test_the_command_refuses_a_folder_that_is_none(tmp_path: Path) -> None:
    done = command(tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
