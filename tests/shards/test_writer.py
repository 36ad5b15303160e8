"""What is written: every column, readable by others, the same bytes of content from any worker, once."""

import dataclasses
import io
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.making import Job, draw, make_config, make_dataset, write
from skipvar.errors import StorageError
from skipvar.shards.encode import decode_image, encode_image
from skipvar.shards.prompts import read_unit
from skipvar.shards.schema import dataset_schema, error_schema
from skipvar.shards.storage import LocalStorage
from skipvar.shards.writer import UnitWriter
from skipvar.types import Failure, Image, Request

COLUMNS = (
    *("id", "position", "image_index", "prompt", "negative_prompt", "seed", "image", "width", "height", "format"),
    *("strategy", "policy", "probe_sobel_change", "probe_fft_high_frequency_ratio", "strategy_scores", "cfg", "tau"),
    *("top_k", "top_p", "aspect_ratio", "scales_run", "cost_share", "audit_ssim", "model", "fingerprint", "unit"),
    *("replica", "created_at", "engine_seconds"),
)


@pytest.fixture
def rich(tmp_path: Path) -> Job:
    """A finished dataset with own columns of many types, failures and a retry."""
    rows: list[dict[str, Any]] = [
        {
            "prompt": f"prompt {i}" + (" bad" if i % 4 == 1 else ""),
            "tag": "counting",
            "width": i,
            "include": [{"class": "cat", "count": 2}],
            "negative_prompt": None if i % 2 else "ugly",
        }
        for i in range(10)
    ]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    job = Job(make_config(input__path=path, output__path=str(tmp_path / "out"), output__unit_rows=4))
    job.make_units()
    job.make = lambda request: Failure.of(request, ValueError("again")) if request.position == 5 else draw(request)
    job.make_units(job.ledger.retry_units(job.plan))
    job.finish()
    return job


def test_every_column_is_there_in_its_type(rich: Job) -> None:
    schema = pq.read_schema(rich.storage.open("data/unit-000000000.parquet"))
    assert schema.names == [*COLUMNS, "tag", "input_width", "include"]
    assert schema.field("cfg").type.value_type == pa.float32()
    assert schema.equals(dataset_schema(rich.plan.spec.columns))
    errors = pq.read_schema(rich.storage.open("errors/unit-000000000.1.parquet"))
    assert errors.equals(error_schema(rich.plan.spec.columns))


def test_readers_of_others_open_it(rich: Job, tmp_path: Path) -> None:
    files = f"{rich.storage.uri}/data/*.parquet"
    for dataset in (
        datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "c1")),
        datasets.load_dataset(rich.storage.uri, split="train", cache_dir=str(tmp_path / "c2")),
    ):
        assert sorted(dataset["position"]) == [0, 1, 2, 3, 4, 6, 7, 8, 9]
        row = next(row for row in dataset if row["position"] == 6)
        assert row["image"].size == (24, 16)
        assert row["strategy_scores"]["base"] == 0.75 and row["include"] == [{"class": "cat", "count": 2}]
    columns = "octet_length(image.bytes) > 100, strategy_scores.base, cfg[1], include[1].count"
    query = f"select id, {columns} from '{files}' order by id"
    assert duckdb.sql(query).fetchall()[0][1:] == (True, 0.75, 3.0, 2)
    frame = polars.read_parquet(files).sort("position")
    assert frame["input_width"].to_list() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert set(frame["model"]) == {"emoji"} and set(frame["fingerprint"]) == {rich.record.fingerprint}


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_images_survive_and_do_not_vary(image_format: str) -> None:
    gradient = np.linspace(0, 255, 32 * 48 * 3).reshape(32, 48, 3).astype(np.uint8)
    data = encode_image(gradient, image_format)
    assert data == encode_image(gradient.copy(order="F"), image_format)
    difference = np.abs(decode_image(data).astype(int) - gradient).max()
    assert difference == 0 if image_format != "jpeg" else difference < 12
    with pytest.raises(ValueError, match="uint8"):
        encode_image(gradient.astype(np.float32), image_format)


def make_writer(job: Job, replica: str, results: list[Image | Failure]) -> UnitWriter:
    writer = UnitWriter(job.plan.unit(0), job.spec, replica, 1, job.storage)
    for result in results:
        writer.add(result)
    return writer


def test_two_workers_agree_whatever_the_order(tmp_path: Path) -> None:
    job = make_dataset(tmp_path, ["a", "b bad", "c", "d"])
    again = Job(
        dataclasses.replace(job.config, output=dataclasses.replace(job.config.output, path=str(tmp_path / "o2")))
    )
    results = [job.make(item) for item in requests(job)]
    first = make_writer(again, "r1", results).publish()
    before = list(again.storage.list("data/"))
    second = make_writer(again, "r2", results[::-1]).publish()
    assert list(again.storage.list("data/")) == before and first.same_content and second.same_content
    assert first.strategies == second.strategies
    assert first.num_images == 3 and first.num_failures == 1
    assert len(list(again.storage.list("data/"))) == 1


def requests(job: Job) -> list[Request]:
    return [item for item in read_unit(job.plan.unit(0), job.plan.spec) if isinstance(item, Request)]


def test_other_content_is_told_and_the_first_stays(tmp_path: Path) -> None:
    job = Job(make_config(input__path=write(tmp_path / "a.txt", "a\nb\n"), output__path=str(tmp_path / "out")))
    first = make_writer(job, "r1", [draw(item) for item in requests(job)]).publish()
    before = job.storage.read("data/unit-000000000.parquet")
    changed = [dataclasses.replace(draw(item), strategy="skip_3") for item in requests(job)]
    second = make_writer(job, "r2", changed).publish()
    assert not second.same_content and second.strategies == first.strategies
    assert job.storage.read("data/unit-000000000.parquet") == before


def test_many_writers_at_once_publish_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(make_config(input__path=write(tmp_path / "a.txt", "a\nb bad\nc\n"), output__path=str(tmp_path / "out")))
    results = [job.make(item) for item in requests(job)]
    writers = [make_writer(job, f"r{i}", results) for i in range(8)]
    was_put, put = [], LocalStorage.put_if_absent

    def watched(storage: LocalStorage, name: str, data: bytes) -> bool:
        done = put(storage, name, data)
        was_put.extend([done] if name.startswith("data/") else [])
        return done

    monkeypatch.setattr(LocalStorage, "put_if_absent", watched)
    reports = []
    threads = [threading.Thread(target=lambda w=writer: reports.append(w.publish())) for writer in writers]  # type: ignore[misc]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(was_put) == [False] * 7 + [True]
    assert all(report.same_content for report in reports)
    assert job.ledger.num_errors() == 1
    assert not list((tmp_path / "out" / "_tmp").iterdir())


def test_a_unit_is_never_published_in_part(tmp_path: Path) -> None:
    job = Job(make_config(input__path=write(tmp_path / "a.txt", "a\nb\n"), output__path=str(tmp_path / "out")))
    writer = make_writer(job, "r", [draw(requests(job)[0])])
    with pytest.raises(AssertionError, match="1 requests are missing"):
        writer.publish()
    assert not list(job.storage.list("data/"))
    with pytest.raises(AssertionError, match="ended twice"):
        writer.add(draw(requests(job)[0]))


def test_a_file_of_another_run_is_refused(tmp_path: Path) -> None:
    job = Job(make_config(input__path=write(tmp_path / "a.txt", "a\n"), output__path=str(tmp_path / "out")))
    job.make_units()
    other = UnitWriter(job.plan.unit(0), dataclasses.replace(job.spec, fingerprint="f" * 16), "r", 1, job.storage)
    other.add(draw(requests(job)[0]))
    with pytest.raises(StorageError, match="belongs to a run with fingerprint"):
        other.publish()


def test_row_groups_are_bounded_in_bytes_and_images_lie_plain(tmp_path: Path) -> None:
    job = make_dataset(tmp_path, ["x"] * 12, output__unit_rows=12, output__max_row_group_bytes=6000)
    metadata = pq.read_metadata(io.BytesIO(job.storage.read("data/unit-000000000.parquet")))
    assert metadata.num_row_groups > 2
    for group in range(metadata.num_row_groups):
        columns = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
        [image] = [column for column in columns if column.path_in_schema == "image.bytes"]
        assert image.total_uncompressed_size <= 6000
        assert image.compression == "UNCOMPRESSED" and not image.has_dictionary_page
        assert all(column.has_offset_index for column in columns)
    assert metadata.metadata[b"skipvar.rows"] == b"12"


def test_a_unit_of_failures_alone_is_published_empty(tmp_path: Path) -> None:
    job = make_dataset(tmp_path, ["bad 1", "bad 2"])
    table = pq.read_table(io.BytesIO(job.storage.read("data/unit-000000000.parquet")))
    assert table.num_rows == 0 and table.column_names == list(COLUMNS)
    assert job.ledger.num_errors() == 2


def test_text_that_is_no_utf8_in_a_message(tmp_path: Path) -> None:
    job = Job(make_config(input__path=write(tmp_path / "a.txt", "a\n"), output__path=str(tmp_path / "out")))
    make_writer(job, "r", [Failure.of(requests(job)[0], ValueError("half \ud800"))]).publish()
    assert pq.read_table(job.storage.open("errors/unit-000000000.1.parquet")).column("message").to_pylist() == [
        "half ?"
    ]


def test_the_specification_travels(rich: Job) -> None:
    assert pickle.loads(pickle.dumps(rich.spec)).columns.equals(rich.plan.spec.columns)
    assert len(pickle.dumps(rich.plan.spec)) < 5000
