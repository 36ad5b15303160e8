"""Bad input of every kind: no exception but a `SkipvarError`, every good row once, every bad row once."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.making import make_config, make_dataset, read_all, write
from skipvar.errors import InputError, SkipvarError, StorageError
from skipvar.report.page import write_report
from skipvar.report.sheet import _wrap
from skipvar.shards.export import export
from skipvar.shards.verify import verify
from skipvar.types import Failure, Request

GOOD = [
    '{"prompt": "a cat"}',
    '{"prompt": "two", "n": 3}',
    '{"prompt": "three", "m": {"a": [1, 2]}}',
    '{"prompt":"\\u00fc"}',
]
BAD = [
    '{"prompt": "x", "m": ' + '{"a":' * 500 + "1" + "}" * 500 + "}",
    '{"prompt": "x", "m": ' + "[" * 100_000 + "}",
    '{"prompt": "x", "\\ud800": 1}',
    '{"prompt": "x", "m": {"\\ud800": 1}}',
    '{"prompt": "x", "n": ' + "9" * 5000 + "}",
    '{"prompt": "x", "seed": ' + "9" * 401 + "}",
    '{"prompt": "\\udfff"}',
    '{"prompt": ["x"]}',
    '{"prompt": "x", "cfg": [[1]]}',
    '{"prompt": "x", "cfg": "[[[["}',
    '{"prompt": "x", "tau": 1e999}',
    '{"prompt": "x", "aspect_ratio": -1}',
    '{"id": {"a": 1}, "prompt": "x"}',
    "{",
    "nul",
    "\x00",
    "\u2028",
]


@pytest.mark.parametrize("seed", range(25))
def test_any_mix_of_rows_is_accounted_for(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    rows = [(True, rng.choice(GOOD)) if rng.random() < 0.5 else (False, rng.choice(BAD)) for _ in range(40)]
    rows.insert(0, (True, GOOD[0]))
    path = write(tmp_path / "a.jsonl", "\n".join(line for _, line in rows))
    items = read_all(make_config(input__path=path, output__unit_rows=rng.choice([1, 3, 64])))
    assert [item.position for item in items] == list(range(len(rows)))
    for item, (is_good, line) in zip(items, rows, strict=True):
        assert isinstance(item, Request) == is_good, (line[:80], item)
        if isinstance(item, Failure):
            item.message.encode()
            assert len(item.message) < 500 and "\n" not in item.message


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "parquet"])
def test_no_bytes_raise_anything_but_a_sentence(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(suffix)
    pq.write_table(pa.table({"prompt": ["a", "b"] * 50, "n": range(100)}), tmp_path / "seed.parquet")
    seeds = {
        "txt": b"one\ntwo\n",
        "jsonl": b'{"prompt": "x", "n": 1}\n{"prompt": "y", "n": 2.5}\n',
        "csv": b'prompt,n\nx,1\n"y, z",2\n',
        "parquet": (tmp_path / "seed.parquet").read_bytes(),
    }
    for number in range(60):
        data = bytearray(seeds[suffix] * (1 if suffix == "parquet" else rng.randint(1, 4)))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            if rng.random() < 0.5:
                data[at] = rng.choice(b'"\r\n,{}[]\x00\xff\\0')
            else:
                del data[at : at + rng.randint(1, 9)]
        path = write(tmp_path / f"{number}.{suffix}", bytes(data))
        try:
            items = read_all(make_config(input__path=path, output__unit_rows=3))
        except SkipvarError as error:
            assert "\n" not in str(error) and len(str(error)) < 700
        else:
            assert [item.position for item in items] == list(range(len(items)))


def test_a_number_too_large_for_its_column_is_an_error_row(tmp_path: Path) -> None:
    rows = ['{"prompt": "x", "f": 1.5}'] * 10_000 + [
        '{"prompt": "x", "f": ' + "9" * 401 + "}",
        '{"prompt": "x", "f": 2}',
    ]
    items = read_all(make_config(input__path=write(tmp_path / "a.jsonl", "\n".join(rows))))
    [failure] = [item for item in items if isinstance(item, Failure)]
    assert failure.position == 10_000 and "too large" in failure.message


def test_a_csv_cell_of_five_thousand_digits(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "prompt,n\nx,1\ny," + "7" * 5000 + "\n")
    assert [item.columns["n"] for item in read_all(make_config(input__path=path))] == ["1", "7" * 5000]


def test_rows_of_a_damaged_row_group_are_error_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"prompt": [f"prompt {i}" for i in range(40)]})
    pq.write_table(table, path, row_group_size=10, write_page_checksum=True, use_dictionary=False)
    data = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    data[start + 40 : start + 60] = bytes(20)
    path.write_bytes(data)
    items = read_all(make_config(input__path=str(path), output__unit_rows=7))
    bad = {item.position: item for item in items if isinstance(item, Failure)}
    assert len(items) == 40 and sorted(bad) == list(range(10, 20))
    assert bad[10].error_class == "InputError" and "a.parquet, row 11: row group 1 is damaged" in bad[10].message


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    paths: dict[str, Any] = {str(tmp_path / "pipe.txt"): "no regular file", "~nosuchuser/a.txt": "cannot be used"}
    paths["/tmp/" + "x" * 300 + ".txt"] = "cannot be used|does not exist"
    for path, message in paths.items():
        with pytest.raises(InputError, match=message):
            read_all(make_config(input__path=path))


def test_a_file_whose_name_is_no_text(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/na\xefve.txt")).write_text("a prompt\n")
    with pytest.raises(InputError, match=r"na\\udcefve\.txt': the file's name is no valid text"):
        read_all(make_config(input__path=str(tmp_path / "*.txt")))


def test_a_long_prompt_is_cut_before_it_is_measured() -> None:
    from PIL import ImageFont

    lines = _wrap("x" * 3_000_000, ImageFont.load_default(size=11), 160)
    assert len(lines) == 1 and lines[0].endswith("...")


def test_damaged_datasets_are_told(tmp_path: Path) -> None:
    job = make_dataset(tmp_path, [f"p{i}" for i in range(10)])
    out = tmp_path / "out"
    (out / "data" / "unit-000000001.parquet").unlink()
    with pytest.raises(SkipvarError, match="1 of 3 units are missing"):
        export(job.storage, "webdataset", tmp_path / "exported")
    record = json.loads((out / "_run.json").read_text())
    for key, value in {"num_rows": 10**30, "prompts_per_unit": "4", "columns": [], "images_per_prompt": 0}.items():
        damaged = {**record, "input": {**record["input"], key: value}}
        (out / "_run.json").write_text(json.dumps(damaged))
        with pytest.raises(StorageError, match="is not the record of a run"):
            verify(job.storage)
    (out / "_run.json").write_text(json.dumps({**record, "state": 5}))
    with pytest.raises(StorageError, match="is not the record of a run"):
        verify(job.storage)
    (out / "_run.json").write_text(json.dumps({**record, "counts": {"cost": "x", "audit_state": [1]}}))
    write_report(job.storage)
    for counts in ({"engine": {"suffix": [1]}}, {"audit_state": {"promise": {"floor": "x"}}}, {"cost": {"usd": "x"}}):
        (out / "_run.json").write_text(json.dumps({**record, "counts": counts}))
        with pytest.raises(StorageError, match=r"_run\.json is damaged: what it tells of the run cannot be shown"):
            write_report(job.storage)
    (out / "_run.json").write_text(json.dumps(record))
    for path in (out / "data").iterdir():
        path.unlink()
    (out / "data").rmdir()
    (out / "data").write_text("a file")
    for use in (lambda: export(job.storage, "webdataset", tmp_path / "exported"), lambda: verify(job.storage)):
        with pytest.raises(StorageError, match="is a file where a folder is due"):
            use()


@pytest.mark.parametrize("folder", ["data", "errors"])
def test_a_report_of_damaged_files_is_a_sentence(tmp_path: Path, folder: str) -> None:
    """Arrow raises `OSError` for some damage of a footer, `ArrowException` for other."""
    job = make_dataset(tmp_path, ["p0", "bad", "p2"])
    [path] = (tmp_path / "out" / folder).glob("*.parquet")
    good, rng = path.read_bytes(), random.Random(3)
    for _ in range(60):
        at = rng.randrange(len(good))
        path.write_bytes(good[:at] + bytes(byte ^ 255 for byte in good[at : at + 20]) + good[at + 20 :])
        try:
            write_report(job.storage)
        except StorageError as error:
            assert path.name in str(error)
