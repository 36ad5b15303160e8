"""Datasets in the forms that others read."""

import json
from pathlib import Path

import pytest
import webdataset
from PIL import Image as PillowImage

from jobs.export import main
from shards.making import Job, make_config, make_dataset, write
from skipvar.shards import export as export_module
from skipvar.shards.export import export


@pytest.fixture
def job(tmp_path: Path) -> Job:
    rows = [{"prompt": f"p{i} ü", "tag": "t", "include": [{"class": "cat", "count": i}]} for i in range(5)]
    rows[3]["prompt"] = "bad"
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    values = {"sampling__images_per_prompt": 2, "output__unit_rows": 4, "output__image_format": "webp"}
    job = Job(make_config(input__path=path, output__path=str(tmp_path / "out"), **values))
    job.make_units()
    job.finish()
    return job


def test_geneval(job: Job, tmp_path: Path) -> None:
    folder = tmp_path / "geneval"
    assert main([job.storage.uri, "--to", "geneval", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["00000", "00001", "00002", "00004"]
    assert json.loads((folder / "00002" / "metadata.jsonl").read_text()) == {
        "tag": "t",
        "include": [{"class": "cat", "count": 2}],
        "prompt": "p2 ü",
    }
    for name in ("0000.png", "0001.png"):
        with PillowImage.open(folder / "00000" / "samples" / name) as image:
            assert image.format == "PNG" and image.size == (24, 16)


def test_webdataset(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "MAX_SHARD_IMAGES", 3)
    for name in ("one", "two"):
        assert main([job.storage.uri, "--to", "webdataset", str(tmp_path / name)]) == 0
    shards = sorted((tmp_path / "one").iterdir())
    assert [path.name for path in shards] == [f"shard-{i:06d}.tar" for i in range(3)]
    assert all(path.read_bytes() == (tmp_path / "two" / path.name).read_bytes() for path in shards)
    samples = list(webdataset.WebDataset([str(path) for path in shards], shardshuffle=False).decode("rgb8"))
    assert len(samples) == 8
    assert samples[1]["__key__"] == "000000000000-1" and samples[1]["webp"].shape == (16, 24, 3)
    assert samples[2]["txt"] == "p1 ü" and samples[2]["json"]["include"] == [{"class": "cat", "count": 1}]


def test_refusals(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([job.storage.uri, "--to", "geneval", str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    job.storage.delete("_SUCCESS")
    assert main([job.storage.uri, "--to", "geneval", str(tmp_path / "x")]) == 2
    assert "not a finished dataset" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_folder_that_one_stands_in_is_a_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_dataset(tmp_path, ["a", "b"])
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert export(job.storage, "geneval", Path()) == 2
    assert (tmp_path / "empty" / "00001" / "metadata.jsonl").exists()
