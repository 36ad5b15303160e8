"""Text input is brought into its normal form once, published beside the dataset, and found there again."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import skipvar.shards.textinput as textinput
from shards.making import NUM_SCALES, Job, make_config, read_all, write
from skipvar.config import RunConfig
from skipvar.errors import InputError, StorageError
from skipvar.shards.ledger import Ledger
from skipvar.shards.prompts import Plan, find_published, plan_input, publish_input, read_unit
from skipvar.shards.storage import LocalStorage, open_storage
from skipvar.types import Failure, Request


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of six rows in row groups of two."""
    monkeypatch.setattr(textinput, "ROW_GROUP_ROWS", 2)
    monkeypatch.setattr(textinput, "PART_ROWS", 6)


def mixed_input(folder: Path, num_rows: int = 10) -> RunConfig:
    """A jsonl with a bad row, and a csv: 2 * num_rows rows in all."""
    lines = [json.dumps({"prompt": f"p{i}", "n": i, "cfg": [1, 2, 3] if i % 2 else 4}) for i in range(num_rows)]
    lines[3] = "not json"
    write(folder / "a.jsonl", "\n".join(lines))
    write(folder / "b.csv", "prompt,seed,n\n" + "".join(f"q{i},{i},{i}.5\n" for i in range(num_rows)))
    return make_config(
        input__path=str(folder / "[ab].*"), output__path=str(folder / "out"), output__unit_rows=4, storage__region="x"
    )


def read_plan(plan: Plan) -> list[Request | Failure]:
    return [item for index in range(plan.num_units) for item in read_unit(plan.unit(index), plan.spec)]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("_input/*"))}


@pytest.mark.usefixtures("small_parts")
def test_published_input_gives_the_same_requests(tmp_path: Path) -> None:
    config = mixed_input(tmp_path)
    before = read_all(config)
    plan = plan_input(config, NUM_SCALES)
    local = Path(plan.unpublished.name)  # type: ignore[union-attr]
    assert local.is_dir() and not (tmp_path / "out").exists()
    published = publish_input(plan, open_storage(config.output.path, config.storage))
    assert not local.exists()
    assert list(hashes(tmp_path / "out")) == [f"part-{number:05d}.parquet" for number in range(4)]
    for path in tmp_path.glob("[ab].*"):  # nobody looks at the sources any more
        path.unlink()
    assert read_plan(published) == before
    assert [item.columns["n"] for item in before if isinstance(item, Request)][-2:] == [8.5, 9.5]
    [failure] = [item for item in before if isinstance(item, Failure)]
    assert failure.position == 3 and failure.message.startswith("a.jsonl, row 4: ")
    table = pq.read_table(tmp_path / "out" / "_input" / "part-00000.parquet")
    assert table.column_names[:4] == ["row_error", "source_file", "source_row", "prompt"]
    assert table.column("row_error")[3].as_py() and table.schema.field("n").type == "double"


@pytest.mark.usefixtures("small_parts")
def test_an_attempt_that_was_cut_off_between_parts_is_completed(tmp_path: Path) -> None:
    config = mixed_input(tmp_path)
    job = Job(config)
    storage = LocalStorage(config.output.path)
    publish_input(job.plan, storage)
    whole = hashes(tmp_path / "out")
    for name in ("part-00001.parquet", "part-00003.parquet"):
        (tmp_path / "out" / "_input" / name).unlink()
    record = Ledger(storage).read_run()
    assert record is not None and find_published(storage, record.input.files) is None
    again = publish_input(plan_input(config, NUM_SCALES), storage)
    assert hashes(tmp_path / "out") == whole
    assert read_plan(again) == read_all(config)


@pytest.mark.usefixtures("small_parts")
def test_a_resumed_run_only_hashes_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = mixed_input(tmp_path)
    job = Job(config)
    storage = LocalStorage(config.output.path)
    first = publish_input(job.plan, storage)
    record = Ledger(storage).read_run()
    assert record is not None
    published = find_published(storage, record.input.files)
    assert published is not None

    def refuse(*_: Any) -> None:
        raise AssertionError("the input was streamed again")

    with monkeypatch.context() as patch:
        patch.setattr("skipvar.shards.prompts.TextNormaliser", refuse)
        again = plan_input(config, NUM_SCALES, published=published)
    assert again.unpublished is None and again.identity == first.identity
    assert read_plan(again) == read_plan(first)
    write(tmp_path / "b.csv", "prompt,seed,n\nother,1,2\n")
    changed = plan_input(config, NUM_SCALES, published=published)
    assert changed.identity != first.identity and changed.unpublished is not None


def test_parts_of_another_input_are_refused(tmp_path: Path) -> None:
    config = mixed_input(tmp_path)
    storage = LocalStorage(config.output.path)
    publish_input(plan_input(config, NUM_SCALES), storage)
    write(tmp_path / "b.csv", "prompt,seed,n\nother,1,2\n")
    with pytest.raises(StorageError, match=r"part-00000\.parquet is not of this run's input"):
        publish_input(plan_input(config, NUM_SCALES), storage)


def test_a_refused_input_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    path = write(tmp_path / "a.csv", "prompt\n" + "x\n" * 30_000 + '"open\n')
    with pytest.raises(InputError, match="line 30002"):
        plan_input(make_config(input__path=path), NUM_SCALES)
    assert not list((tmp_path / "tmp").iterdir())


def test_user_columns_may_have_the_names_of_the_hidden_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "prompt,row_error,source_row\nx,mine,7\n")
    [request] = read_all(make_config(input__path=path))
    assert request.columns == {"row_error": "mine", "source_row": 7}


def test_many_small_files_share_parts(tmp_path: Path) -> None:
    for number in range(50):
        write(tmp_path / f"{number:02d}.txt", f"a{number}\nb{number}\n")
    plan = plan_input(make_config(input__path=str(tmp_path / "*.txt"), output__unit_rows=7), NUM_SCALES)
    assert len(plan.ranges) == 1 and plan.identity.num_rows == 100
    assert [item.prompt for item in read_plan(plan)] == [f"{kind}{number}" for number in range(50) for kind in "ab"]
