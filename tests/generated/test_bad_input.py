"""Whatever is fed to the commands: a documented exit code, one sentence, no secret, every row once, nothing on exit 2.

`make test` tries a few cases that are always the same, `make test-faults` thousands that are not.
"""

import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from shards.making import make_dataset

from generated.bad import SECRET, Rows, damages, json_damages, overrides, rows, yaml_texts
from generated.calling import Said, call, without_ray
from skipvar.cli import export, generate, report, verify
from skipvar.model.identity import EMBEDDED_FOLDER

FEW = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # what fails is short as it is: looking for a shorter case takes minutes
    suppress_health_check=list(HealthCheck),
)
MANY = settings(FEW, max_examples=int(os.environ.get("GENERATED_CASES", "1500")), derandomize=False)
QUIET = ("storage.retry_seconds=0", "max_error_share=1", "output.unit_rows=3")
RANDOM = ("model.path=random:0", "model.device=cpu", "policy=spread")


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="skipvar-generated-") as name:
        yield Path(name)


def check(said: Said, codes: set[int]) -> None:
    assert said.code in codes, said
    assert "Traceback" not in said.err + said.out
    assert SECRET not in said.err + said.out
    if said.code in (2, 4):
        last = said.err.strip().splitlines()[-1]
        assert said.code == 4 or said.err.count("\n") <= 3, said.err
        if "reason: " not in said.out:
            assert last.startswith("error: ") and len(last) < 700, said.err


def run(folder: Path, *arguments: str, config: str = "conf/emoji.yaml") -> Said:
    """A whole run without Ray and model, into `folder/out`; on exit 2 that is not there."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    with without_ray():
        said = call(generate.main, config, *QUIET, f"output.path={out}", *arguments)
    check(said, {0, 2, 3, 4})
    assert said.code != 2 or not out.exists() or not any(path.is_file() for path in out.rglob("*")), said
    return said


def configurations(folder: Path) -> Callable[[list[str], str], None]:
    (folder / "p.txt").write_text("a cat\na dog\n")

    def case(given_overrides: list[str], text: str) -> None:
        run(folder, f"input.path={folder}/p.txt", *RANDOM, *given_overrides)
        path = folder / "run.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        run(folder, f"input.path={folder}/p.txt", *RANDOM, config=str(path))

    return case


def inputs(folder: Path) -> Callable[[Rows, Any], None]:
    def case(given_rows: Rows, damage: Any) -> None:
        path = folder / f"input.{given_rows.suffix}"
        data = given_rows.data if damage is None else damage(given_rows.data)
        path.write_bytes(data)
        said = run(folder, f"input.path={path}", *RANDOM)
        assert damage is not None or said.code in (0, 3) or not given_rows.good, said
        if said.code not in (0, 3):
            return
        whole = call(verify.main, str(folder / "out"))
        check(whole, {0})
        data_files = sorted((folder / "out" / "data").glob("*.parquet"))
        made = [at for file in data_files for at in pq.read_table(file).column("position").to_pylist()]
        assert len(set(made)) == len(made)
        if damage is None:
            assert f"for {given_rows.num_rows} requests" in whole.out, whole.out
            assert set(given_rows.good) <= set(made)

    return case


def models(folder: Path) -> Callable[[str, Any, Any], None]:
    names = {
        "config.json": EMBEDDED_FOLDER / "config.json",
        "text_encoder/config.json": EMBEDDED_FOLDER / "text_encoder" / "config.json",
        "text_encoder/tokenizer.json": EMBEDDED_FOLDER / "text_encoder" / "tokenizer.json",
        "policy.json": Path("conf/policies/emoji_0.86.json"),
        "vae.safetensors": EMBEDDED_FOLDER / "vae.safetensors",
        "text_encoder/model.safetensors": EMBEDDED_FOLDER / "text_encoder" / "model.safetensors",
    }
    shutil.copytree(EMBEDDED_FOLDER, folder / "model")
    shutil.copy(names["policy.json"], folder / "policy.json")
    (folder / "p.txt").write_text("a cat\n")

    def case(name: str, damage: Any, json_damage: Any) -> None:
        target = folder / name if name == "policy.json" else folder / "model" / name
        good = names[name].read_bytes()
        target.write_bytes((json_damage if name.endswith(".json") and json_damage else damage)(good))
        try:
            said = run(
                folder, f"input.path={folder}/p.txt", f"model.path={folder}/model", f"policy={folder}/policy.json"
            )
            assert said.code != 4, said
        finally:
            target.write_bytes(good)

    return case


def datasets(folder: Path) -> Callable[[int, str, Any, Any], None]:
    make_dataset(folder, [f"{'bad ' * (n % 5 == 0)}{n}" for n in range(9)])
    good = folder / "out"
    files = sorted(path.relative_to(good) for path in good.rglob("*") if path.is_file())

    def case(number: int, how: str, damage: Any, json_damage: Any) -> None:
        hurt = folder / "hurt"
        for path in (hurt, folder / "exported"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(good, hurt)
        path = hurt / files[number % len(files)]
        data = path.read_bytes()
        if how == "gone":
            path.unlink()
        elif how == "folder":
            path.unlink()
            path.mkdir()
        elif path.name == "_run.json" and how == "json":
            path.write_bytes(json_damage(data))
        else:
            path.write_bytes(damage(data))
        told = call(verify.main, str(hurt), "--full")
        check(told, {0, 1, 4})
        if path.parent.name == "data" and not (path.is_file() and path.read_bytes() == data):
            assert told.code != 0 or pq.read_table(path).equals(pq.read_table(io.BytesIO(data))), told
        exported = call(export.main, str(hurt), "--to", "webdataset", str(folder / "exported"))
        check(exported, {0, 2, 4})
        if exported.code == 0 and path.name != "_run.json":
            assert exported.out.startswith("7 images"), exported
        check(call(report.main, str(hurt)), {0, 2, 4})

    return case


FAMILIES = {
    "configurations": (configurations, (st.lists(overrides, min_size=1, max_size=3), yaml_texts)),
    "inputs": (inputs, (rows, st.none() | damages())),
    "models": (
        models,
        (
            st.sampled_from(["config.json", "policy.json"] * 3 + ["text_encoder/config.json", "vae.safetensors"])
            | st.sampled_from(["text_encoder/tokenizer.json", "text_encoder/model.safetensors"]),
            damages(),
            st.none() | json_damages(),
        ),
    ),
    "datasets": (
        datasets,
        (st.integers(0, 99), st.sampled_from(["gone", "folder", "json", "bytes", "bytes"]), damages(), json_damages()),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_cases(family: str, folder: Path) -> None:
    prepare, parts = FAMILIES[family]
    FEW(given(*parts)(prepare(folder)))()


@pytest.mark.faults
@pytest.mark.parametrize("family", FAMILIES)
def test_thousands_of_cases(family: str, folder: Path) -> None:
    prepare, parts = FAMILIES[family]
    MANY(given(*parts)(prepare(folder)))()
