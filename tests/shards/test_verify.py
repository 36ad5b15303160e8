"""`jobs.verify` finds whatever is wrong with a dataset, names it, and repairs nothing by itself."""

import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.verify import main
from shards.making import Job, draw, make_config, make_dataset, refuse_bad, write
from skipvar.shards.schema import IMAGE_BYTES
from skipvar.shards.unitfile import ContentHash, UnitFooter
from skipvar.shards.verify import verify
from skipvar.types import Failure, Image, Request

NAME = "data/unit-000000001.parquet"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_dataset(tmp_path, [f"prompt {i}" + (" bad" if i == 5 else "") for i in range(11)])


def run(job: Job, *options: str) -> int:
    return main([job.storage.uri, *options])


def test_a_whole_dataset(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(job) == 0 and run(job, "--full") == 0
    assert "is whole: 10 images and 1 errors for 11 requests." in capsys.readouterr().out


def rewrite(job: Job, name: str, change: Callable[[pa.Table], pa.Table], **footer: object) -> None:
    """The file with other rows (and a footer to match if so asked), without the checksum of itself."""
    file = pq.ParquetFile(io.BytesIO(job.storage.read(name)))
    metadata = {key: value for key, value in file.metadata.metadata.items() if key.startswith(b"skipvar.")}
    table = change(file.read())
    table = table.replace_schema_metadata(
        {key: value for key, value in (table.schema.metadata or {}).items() if key not in metadata}
    )
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema) as writer:
        writer.write_table(table)
        parsed = UnitFooter.from_metadata(metadata)
        writer.add_key_value_metadata(UnitFooter(**{**parsed.__dict__, **footer}).to_metadata())  # type: ignore[arg-type]
    job.storage.replace(name, sink.getvalue())


def flip(job: Job, name: str) -> None:
    """A bit in the middle of the images."""
    data = bytearray(job.storage.read(name))
    group = pq.ParquetFile(io.BytesIO(bytes(data))).metadata.row_group(0)
    (images,) = (
        column
        for column in (group.column(index) for index in range(group.num_columns))
        if column.path_in_schema == IMAGE_BYTES
    )
    data[images.data_page_offset + images.total_compressed_size // 2] ^= 1
    job.storage.replace(name, bytes(data))


DAMAGE: dict[str, tuple[Callable[[Job], None], str]] = {
    "a unit is gone": (lambda job: job.storage.delete(NAME), r"Unit 1 is not published"),
    "a bit flipped": (lambda job: flip(job, NAME), r"unit-000000001\.parquet cannot be read.*CRC"),
    "cut short": (
        lambda job: job.storage.replace(NAME, job.storage.read(NAME)[:5000]),
        r"cannot be read|not a readable",
    ),
    "empty": (lambda job: job.storage.replace(NAME, b""), r"not a readable"),
    "a row is gone": (lambda job: rewrite(job, NAME, lambda t: t.slice(1)), r"has 2 rows; its footer says 3"),
    "a row twice": (lambda job: rewrite(job, NAME, lambda t: pa.concat_tables([t, t])), r"stands twice"),
    "another prompt": (
        lambda job: rewrite(job, NAME, lambda t: t.set_column(3, "prompt", pa.array(["x"] * 3))),
        r"does not have the hash",
    ),
    "a column less": (lambda job: rewrite(job, NAME, lambda t: t.drop_columns(["tau"])), r"the columns tau are not"),
    "another run's": (lambda job: rewrite(job, NAME, lambda t: t, fingerprint="0" * 16), r"its footer says"),
    "another unit's": (
        lambda job: job.storage.replace(NAME, job.storage.read("data/unit-000000000.parquet")),
        r"footer",
    ),
    "a foreign file": (
        lambda job: job.storage.replace("data/unit-000000009.parquet", job.storage.read(NAME)),
        r"belong to no unit",
    ),
    "a stray file": (lambda job: job.storage.replace("data/part.parquet", b"x"), r"belong to no unit"),
    "the errors are gone": (lambda job: job.storage.delete("errors/unit-000000001.1.parquet"), r"there is no such"),
    "the errors are said to lie elsewhere": (
        lambda job: rewrite(job, NAME, lambda t: t, errors="../errors/unit-000000001.1.parquet"),
        r"unit-000000001\.parquet is not a readable",
    ),
    "an error row is gone": (
        lambda job: rewrite(job, NAME, lambda t: t, errors=None, error_rows=0),
        r"unit 1: 1 requests, such as \(5, 0\), are in neither",
    ),
    "no mark of success": (lambda job: job.storage.delete("_SUCCESS"), r"All units are there but _SUCCESS is not"),
    "no record": (lambda job: job.storage.delete("_run.json"), r"has no _run.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_named(job: Job, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    harm, message = DAMAGE[damage]
    harm(job)
    assert run(job) == 1
    assert re.search(f"problem: .*{message}", capsys.readouterr().out)


@pytest.mark.parametrize("name", [NAME, "errors/unit-000000001.1.parquet"])
def test_a_flipped_bit_outside_the_rows(job: Job, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Statistics and indexes, by which readers skip pages, and all else of the footer."""
    whole = job.storage.read(name)
    data = bytearray(whole)
    end = max(
        column.data_page_offset + column.total_compressed_size
        for group in [pq.ParquetFile(io.BytesIO(whole)).metadata.row_group(0)]
        for column in map(group.column, range(group.num_columns))
    )
    label = whole.rindex(b"skipvar.file_sha256")
    places = [place for place in range(end, len(whole), 37) if not label <= place < label + 20]
    for number, place in enumerate(places):
        data[place] ^= 1 << number % 8
        job.storage.replace(name, bytes(data))
        assert run(job) == 1, f"byte {place} of {len(whole)}"
        data[place] = whole[place]
    job.storage.replace(name, whole)
    capsys.readouterr()
    assert run(job) == 0 and len(places) > 10


def test_a_file_of_before_there_were_checksums(job: Job) -> None:
    rewrite(job, NAME, lambda table: table)
    assert b"file_sha256" not in job.storage.read(NAME) and run(job, "--full") == 0


def test_an_image_that_is_none(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    """With a hash to match, as a broken encoder would make it."""
    table = pq.read_table(io.BytesIO(job.storage.read(NAME)))
    rows = table.to_pylist()
    rows[1]["image"]["bytes"] = b"no image"
    changed = pa.Table.from_pylist(rows, schema=table.schema)
    content = ContentHash()
    for batch in changed.to_batches():
        content.update(batch)
    rewrite(job, NAME, lambda _: changed, content_hash=content.hexdigest())
    assert run(job, "--full") == 1
    assert "the image of request (6, 0) cannot be decoded" in capsys.readouterr().out


def test_retries_are_understood(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.make = draw
    job.make_units(job.ledger.retry_units(job.plan))
    job.finish()
    assert run(job, "--full") == 0
    assert "11 images and 0 errors" in capsys.readouterr().out
    shutil.copy(f"{job.storage.uri}/data/unit-000000001.retry-1.parquet", f"{job.storage.uri}/data/x")
    job.storage.replace("data/unit-000000001.retry-2.parquet", job.storage.read("data/x"))
    job.storage.delete("data/x")
    assert run(job) == 1


def test_repair_names_and_unpublishes_only_when_told(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    flip(job, NAME)
    job.storage.delete("data/unit-000000000.parquet")
    before = [entry.name for entry in job.storage.list()]
    assert run(job, "--repair") == 1
    assert "to be made again: units 0, 1" in capsys.readouterr().out
    assert [entry.name for entry in job.storage.list()] == before
    assert run(job, "--repair", "--yes") == 1
    assert [entry.name for entry in job.storage.list("data/")] == ["data/unit-000000002.parquet"]
    assert not job.ledger.is_finished()
    job.make_units()
    job.finish()
    assert run(job, "--full") == 0


def test_orphans_and_repeated_ids_are_named_but_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"p{i},{'same' if i in (1, 7) else i}\n" for i in range(9))
    path = write(tmp_path / "a.csv", f"prompt,id\n{rows}")
    job = Job(make_config(input__path=path, output__path=str(tmp_path / "out"), output__unit_rows=3))
    job.storage.put_if_absent("errors/unit-000000000.1.parquet", b"left behind")
    job.make_units()
    job.finish()
    assert run(job) == 0
    output = capsys.readouterr().out
    assert "1 ids stand at several positions: 'same'." in output
    assert "errors/unit-000000000.1.parquet" in output


def test_usage() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["x", "--yes"])
    assert stop.value.code == 2
    assert main(["gs://x"]) == 2
    assert main(["/nowhere/at/all"]) == 1


def of_csv(tmp_path: Path, text: str, make: Callable[[Request], Image | Failure], **values: Any) -> Job:
    path = write(tmp_path / "prompts.csv", text)
    return Job(make_config(input__path=path, output__path=str(tmp_path / "out"), output__unit_rows=8, **values), make)


def test_an_id_whose_images_lie_in_a_unit_and_its_retry_stands_at_one_position(tmp_path: Path) -> None:
    def make(request: Request) -> Image | Failure:
        return Failure.of(request, ValueError("now")) if request.key == (0, 1) else draw(request)

    job = of_csv(tmp_path, "prompt,id\na cat,x\na dog,y\n", make, sampling__images_per_prompt=2)
    job.make_units()
    job.make = draw
    job.make_units(job.ledger.retry_units(job.plan))
    job.finish()
    verdict = verify(job.storage)
    assert verdict.is_whole and not [note for note in verdict.notes if "ids stand" in note]


def test_repeated_ids_beside_a_damaged_retry_are_a_verdict(tmp_path: Path) -> None:
    job = of_csv(tmp_path, "prompt,id\na cat,x\na dog,x\nbad,z\n", refuse_bad)
    job.make_units()
    job.make = draw
    job.make_units(job.ledger.retry_units(job.plan))
    job.finish()
    [retry] = (tmp_path / "out" / "data").glob("*retry*")
    retry.write_bytes(retry.read_bytes()[:300])
    verdict = verify(job.storage)
    assert not verdict.is_whole and verdict.units_to_make == [0] and "retry-1" in verdict.problems[0]
