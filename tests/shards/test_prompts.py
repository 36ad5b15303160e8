"""Inputs of every format become requests; bad rows become failures; bad files are told in one sentence."""

import dataclasses
import errno
import hashlib
import io
import json
import os
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.making import NUM_SCALES, make_config, read_all, write
from skipvar.errors import ConfigError, InputError, StorageError
from skipvar.shards.prompts import plan_input, read_unit
from skipvar.shards.sources import open_parquet
from skipvar.types import Failure, Request


def requests_of(path: Any, **values: Any) -> list[Request]:
    items = read_all(make_config(input__path=path, **values))
    assert all(isinstance(item, Request) for item in items), items
    return items  # type: ignore[return-value]


def failures_of(path: Any, **values: Any) -> dict[int, str]:
    """Messages of the failures by position."""
    items = read_all(make_config(input__path=path, **values))
    return {item.position: item.message for item in items if isinstance(item, Failure)}


def test_txt_keeps_text_and_drops_blank_lines(tmp_path: Path) -> None:
    content = '\ufeffone\r\n\r\n   \nzwei "ü" 日本\u2028x\n\t\n  three  \n'
    requests = requests_of(write(tmp_path / "a.txt", content), output__unit_rows=2)
    assert [request.prompt for request in requests] == ["one", 'zwei "ü" 日本\u2028x', "  three  "]
    assert [request.position for request in requests] == [0, 1, 2]
    assert requests[2].id == "000000000002"


@pytest.mark.parametrize("unit_rows", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "parquet"])
def test_units_cover_every_row_once(tmp_path: Path, suffix: str, unit_rows: int) -> None:
    prompts = [f'prompt {i} ü "{i}"' for i in range(23)]
    path = tmp_path / f"a.{suffix}"
    if suffix == "txt":
        write(path, "\n".join(prompts))
    elif suffix == "jsonl":
        write(path, "".join(json.dumps({"prompt": prompt}) + "\n\n" for prompt in prompts))
    elif suffix == "csv":
        write(path, "prompt\n" + "\n".join('"' + p.replace('"', '""') + '\nnext line"' for p in prompts))
    else:
        pq.write_table(pa.table({"prompt": prompts}), path, row_group_size=5)
    plan = plan_input(make_config(input__path=str(path), output__unit_rows=unit_rows), NUM_SCALES)
    assert plan.num_units == -(-23 // unit_rows)
    requests = requests_of(str(path), output__unit_rows=unit_rows)
    assert [request.position for request in requests] == list(range(23))
    assert [request.prompt.removesuffix("\nnext line") for request in requests] == prompts
    assert all(plan.unit(i).num_rows <= unit_rows for i in range(plan.num_units))


def test_units_go_over_the_borders_of_files(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.txt", f"{name}0\n{name}1\n{name}2\n") for name in "cab"]
    pq.write_table(pa.table({"prompt": ["p0", "p1"]}), tmp_path / "d.parquet")
    write(tmp_path / "empty.txt", "\n\n")
    path = [paths[0], str(tmp_path / "empty.txt"), str(tmp_path / "[ab].txt"), str(tmp_path / "d.parquet")]
    prompts = [request.prompt for request in requests_of(path, output__unit_rows=4)]
    assert prompts == ["c0", "c1", "c2", "a0", "a1", "a2", "b0", "b1", "b2", "p0", "p1"]
    assert requests_of(path, output__unit_rows=4, input__limit=5)[-1].prompt == "a1"
    assert plan_input(make_config(input__path=path, input__limit=5), NUM_SCALES).identity.num_rows == 5


def test_seeds_and_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt":"x"}\n{"prompt":"y","id":"mine","seed":5}\n{"prompt":"z","id":12}\n')
    first, second, third = requests_of(path, sampling__seed=42)
    digest = hashlib.sha256(b"42|000000000000|0").digest()
    assert first.seed == int.from_bytes(digest[:8], "big") % 2**63
    assert (second.id, second.seed, third.id) == ("mine", 5, "12")


def test_several_images_per_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt":"x"}\n{"prompt":"y","id":"mine","seed":5}\n{"prompt":3}\n')
    config = make_config(input__path=path, sampling__images_per_prompt=3, output__unit_rows=7)
    plan = plan_input(config, NUM_SCALES)
    assert (plan.identity.prompts_per_unit, plan.identity.num_requests, plan.num_units) == (2, 9, 2)
    items = read_all(config)
    assert [item.key for item in items] == [(p, k) for p in range(3) for k in range(3)]
    assert [item.id for item in items[:4]] == ["000000000000-0", "000000000000-1", "000000000000-2", "mine"]
    assert len({item.seed for item in items[:6]}) == 6
    assert [item.seed for item in items[3:6]] == [5, 6, 7]
    assert all(isinstance(item, Failure) for item in items[6:])


def test_own_columns_and_settings_win(tmp_path: Path) -> None:
    text = (
        "caption,name,cfg,tau,negative_prompt,aspect_ratio,prompt,zip,score\n"
        'a,n1,"3,2,1",0.7,ugly,1.5,own,007,1\nb,,,,,,,,2.5\nc,n3,"[1, 1, 4]","[0.5,0.5,1]",,0.5,,1,\n'
    )
    path = write(tmp_path / "a.csv", text)
    values = {"input__prompt_column": "caption", "input__id_column": "name", "sampling__negative_prompt": "default"}
    first, second, third = requests_of(path, **values)
    assert (first.prompt, first.id, first.cfg, first.tau) == ("a", "n1", (3, 2, 1), (0.7,) * 3)
    assert (first.negative_prompt, first.aspect_ratio) == ("ugly", 1.5)
    assert first.columns == {"prompt": "own", "zip": "007", "score": 1.0}
    assert (second.id, second.cfg, second.tau, second.negative_prompt) == (
        f"{1:012d}",
        (3.0,) * 3,
        (0.5,) * 3,
        "default",
    )
    assert second.columns == {"prompt": None, "zip": None, "score": 2.5}
    assert (third.cfg, third.tau) == ((1, 1, 4), (0.5, 0.5, 1))


def test_parquet_types(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": pa.array(["a", "b"]).dictionary_encode(),
            "seed": pa.array([1.0, None]),
            "cfg": pa.array([[3.0, 2.0, 1.0], None]),
            "when": pa.array([1_000_000_001, None], pa.timestamp("ns", "UTC")),
            "tag": pa.array(["u", None]).dictionary_encode(),
            "boxes": pa.array([[{"x": 1}], []]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    config = make_config(input__path=str(tmp_path / "*.parquet"))
    first, second = requests_of(str(tmp_path / "*.parquet"))
    assert first.seed == 1 and first.cfg == (3, 2, 1) and first.columns["boxes"] == [{"x": 1}]
    assert second.seed > 1 and second.columns["tag"] is None
    columns = plan_input(config, NUM_SCALES).spec.columns
    assert columns.field("when").type == pa.timestamp("us", "UTC") and columns.field("tag").type == pa.string()


def test_a_parquet_column_of_an_extension_type_is_kept_as_it_is_stored(tmp_path: Path) -> None:
    labels = [uuid.uuid4().bytes, None]
    pq.write_table(pa.table({"prompt": ["a", "b"], "label": pa.array(labels, pa.uuid())}), tmp_path / "a.parquet")
    requests = requests_of(str(tmp_path / "a.parquet"))
    assert [request.columns["label"] for request in requests] == labels


def test_columns_of_other_types_in_other_files_are_brought_into_one(tmp_path: Path) -> None:
    """Values that do not fit make error rows, with all that can be read of them."""
    pq.write_table(pa.table({"prompt": ["a", "b"], "id": ["i", "j"], "n": [1, 2**60 + 1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"prompt": ["c"], "n": [0.5], "k": pa.array([7], pa.uint8())}), tmp_path / "b.parquet")
    rows = [{"prompt": "x"}] * 10_000 + [{"prompt": "y", "k": 255}, {"prompt": "z", "k": 300}]
    write(tmp_path / "c.jsonl", "\n".join(map(json.dumps, rows)))
    config = make_config(input__path=str(tmp_path / "*"))
    columns = plan_input(config, NUM_SCALES).spec.columns
    assert [str(field.type) for field in columns] == ["double", "uint8"]
    items = read_all(config)
    first, bad, other = items[:3]
    fits, too_large = items[-2:]
    assert isinstance(first, Request) and isinstance(other, Request) and isinstance(fits, Request)
    assert (first.columns["n"], type(first.columns["n"])) == (1.0, float) and other.columns == {"n": 0.5, "k": 7}
    assert isinstance(bad, Failure) and (bad.id, bad.prompt) == ("j", "b") and "cannot be read" in bad.message
    assert fits.columns["k"] == 255
    assert isinstance(too_large, Failure) and "column 'k' is a number here, but uint8" in too_large.message


def test_decimals_in_a_column_of_floats(tmp_path: Path) -> None:
    prices = pa.array([Decimal("2.50"), None], pa.decimal128(10, 2))
    pq.write_table(pa.table({"prompt": ["a", "b"], "price": prices}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"prompt": ["c"], "price": [0.25]}), tmp_path / "b.parquet")
    assert [item.columns["price"] for item in requests_of(str(tmp_path / "*.parquet"))] == [2.5, None, 0.25]


def test_columns_of_files_beyond_the_limit_do_not_count(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", "b"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"prompt": ["c"], "n": [1]}), tmp_path / "b.parquet")
    requests = requests_of(str(tmp_path / "*.parquet"), input__limit=2)
    assert [(request.prompt, request.columns) for request in requests] == [("a", {}), ("b", {})]


BAD_ROWS = {
    '{"prompt": 5}': "must be text, not 5",
    '{"prompt": null}': "is empty",
    '{"prompt": "   "}': "is empty",
    '{"text": "no prompt"}': "is empty",
    "not json": "no valid JSON",
    '{"prompt": "cut': "no valid JSON",
    "[1, 2]": "must be a JSON object",
    '"text"': "must be a JSON object",
    "null": "must be a JSON object",
    '{"prompt": "x", "seed": -1}': "seed is -1",
    '{"prompt": "x", "seed": 9223372036854775808}': "seed is 9223372036854775808",
    '{"prompt": "x", "seed": 1.5}': "seed is 1.5",
    '{"prompt": "x", "seed": true}': "seed is True",
    '{"prompt": "x", "seed": [1]}': "seed is [1]",
    '{"prompt": "x", "cfg": [1, 2]}': "cfg is a list of 2",
    '{"prompt": "x", "cfg": []}': "cfg is a list of 0",
    '{"prompt": "x", "cfg": NaN}': "cfg is nan",
    '{"prompt": "x", "cfg": 1e39}': "cfg is 1e+39",
    '{"prompt": "x", "cfg": -1}': "cfg is -1",
    '{"prompt": "x", "cfg": "three"}': "cfg is 'three'",
    '{"prompt": "x", "cfg": {"a": 1}}': "cfg is {'a': 1}",
    '{"prompt": "x", "cfg": [1, null, 2]}': "cfg is None",
    '{"prompt": "x", "tau": 0}': "tau is 0",
    '{"prompt": "x", "tau": Infinity}': "tau is inf",
    '{"prompt": "x", "aspect_ratio": 0}': "aspect_ratio is 0",
    '{"prompt": "x", "aspect_ratio": "wide"}': "aspect_ratio is 'wide'",
    '{"prompt": "x", "negative_prompt": 3}': "'negative_prompt' must be text",
    '{"prompt": "x", "id": [1]}': "'id' must be text or a whole number",
    '{"prompt": "\\ud800"}': "surrogate",
    '{"prompt": "x", "id": "\\udfff"}': "surrogate",
    '{"prompt": "x", "tag": "\\ud800"}': "surrogate",
    '{"prompt": "' + "x" * 1_100_000 + '"}': "at most 1048576",
    '{"prompt": ' + "[" * 5000 + "]" * 5000 + "}": "",
}


def test_bad_rows_are_failures_among_good_ones(tmp_path: Path) -> None:
    lines = ['{"prompt": "good", "tag": "t"}', *BAD_ROWS, '{"prompt": "good too"}']
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    items = read_all(make_config(input__path=path, output__unit_rows=4))
    assert isinstance(items[0], Request) and isinstance(items[-1], Request)
    assert len(items) == len(lines)
    for item, (line, message) in zip(items[1:-1], BAD_ROWS.items(), strict=True):
        assert isinstance(item, Failure), line
        assert message in item.message and f"a.jsonl, row {item.position + 1}: " in item.message, (line, item.message)
        assert item.message.endswith(".") and "\n" not in item.message
        assert item.error_class == "RowError"
        item.prompt.encode()


def test_a_type_unlike_the_first_rows_is_a_failure(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "x", "n": 1, "s": "t", "b": {"k": 1}}] * 10_001
    rows += [{"prompt": "x", "n": "one"}, {"prompt": "x", "s": 4}, {"prompt": "x", "b": {"new": 1}}, {"prompt": "x"}]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    failures = failures_of(path)
    assert sorted(failures) == [10_001, 10_002, 10_003]
    assert "column 'n' is text here, but int64" in failures[10_001]
    assert "'new'" in failures[10_003]


def test_mixed_types_in_the_first_rows_become_json_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt":"x","m":1}\n{"prompt":"y","m":"a"}\n{"prompt":"z","m":{}}\n')
    assert [request.columns["m"] for request in requests_of(path)] == ["1", '"a"', "{}"]


def test_csv_rows_of_the_wrong_length(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "prompt,n\nok,1\n\nshort\nlong,1,2\nok,2\n")
    failures = failures_of(path)
    assert sorted(failures) == [1, 2] and "1 fields; the header has 2" in failures[1]


BAD_FILES = {
    "latin.txt": (b"ok\nna\xefve\n", "not UTF-8 at byte 5"),
    "latin.csv": (b"prompt\nna\xefve\n", "not UTF-8 at byte 9"),
    "utf16.txt": ("text".encode("utf-16"), "not UTF-8 at byte 0"),
    "empty.txt": (b"", "holds no rows"),
    "blank.txt": (b"\n \n", "holds no rows"),
    "empty.csv": (b"", "is empty"),
    "header.csv": (b"prompt\n", "holds no rows"),
    "columns.csv": (b"text\nx\n", "has no column 'prompt'; it has text"),
    "twice.csv": (b"prompt,a,a\nx,1,2\n", "'a' stands twice"),
    "unnamed.csv": (b"prompt,\nx,1\n", "has no name"),
    "quote.csv": (b'prompt\n"never closed\n' + b"x" * 100, "line 2: a field begins with a quotation mark and is not"),
    "last_quote.csv": (b'prompt\na\n"never closed', "line 3: a field begins with a quotation mark and is not"),
    "inner_quote.csv": (b'prompt,n\nx,1\n"a,1\nb,2\n"c",3\nd,4\n', "line 3: a quoted field goes on over several lines"),
    "old_mac.csv": (b"prompt\rx\ry", "line 1: a carriage return stands alone"),
    "columns.jsonl": (b'{"text": "x"}\n', "has no column 'prompt'; it has text"),
    "rubbish.parquet": (b"PAR1 is not enough PAR1", "not a readable Parquet file"),
    "tiny.parquet": (b"x", "not a readable Parquet file"),
    "none.parquet": (b"", "not a readable Parquet file"),
    "prompts.tsv": (b"x", "'.tsv' cannot be read"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_told_in_one_sentence(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    path = write(tmp_path / name, content)
    with pytest.raises(InputError) as error:
        plan_input(make_config(input__path=path), NUM_SCALES)
    assert message in str(error.value) and str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere/a.txt", "does not exist"),
        ("/nowhere/*.txt", "matches no file"),
        (["/nowhere/a.txt"], "does not exist"),
        ([], "a file, a glob"),
        (3, "a file, a glob"),
        ("http://x/a.txt", "a local path or s3"),
        ("/tmp", "is a folder"),
    ],
)
def test_paths_that_name_nothing(path: Any, message: str) -> None:
    with pytest.raises((InputError, ConfigError), match=message):
        plan_input(make_config(input__path=path), NUM_SCALES)


def test_prompts_that_are_no_text_stop_a_parquet_run(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="prompts must be text"):
        plan_input(make_config(input__path=str(tmp_path / "a.parquet")), NUM_SCALES)


def test_types_that_do_not_fit_over_files(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "prompt,n\nx,1\n")
    write(tmp_path / "b.csv", "prompt,n\nx,\n")
    write(tmp_path / "c.csv", "prompt,n\nx,abc\n")
    assert (
        plan_input(make_config(input__path=str(tmp_path / "[ab].csv")), NUM_SCALES).spec.columns.field("n").type
        == pa.int64()
    )
    with pytest.raises(InputError, match=r"c\.csv.*another type"):
        plan_input(make_config(input__path=str(tmp_path / "*.csv")), NUM_SCALES)


def test_a_column_that_no_reader_knows(tmp_path: Path) -> None:
    kind = pa.map_(pa.string(), pa.int64())
    pq.write_table(pa.table({"prompt": ["x"], "m": pa.array([[("a", 1)]], kind)}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="column 'm' has type map"):
        plan_input(make_config(input__path=str(tmp_path / "a.parquet")), NUM_SCALES)


def test_the_named_id_column_must_be_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "prompt\nx\n")
    with pytest.raises(InputError, match=r"input\.id_column"):
        plan_input(make_config(input__path=path, input__id_column="key"), NUM_SCALES)


def test_settings_of_the_wrong_length_are_told_by_key(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x\n")
    with pytest.raises(ConfigError, match=r"sampling\.cfg: \[1, 2\] is not usable; .*list of 3, one for each scale"):
        plan_input(make_config(input__path=path, sampling__cfg=[1, 2]), num_scales=3)


@pytest.mark.parametrize("suffix", ["txt", "parquet"])
def test_an_input_that_changed_is_found(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"

    def fill(text: str) -> None:
        if suffix == "txt":
            write(path, f"{text}\nb\n")
        else:
            pq.write_table(pa.table({"prompt": [text, "b"]}), path)

    fill("a")
    config = make_config(input__path=str(path), output__unit_rows=1)
    plan = plan_input(config, NUM_SCALES)
    fill("c")
    assert plan_input(config, NUM_SCALES).identity != plan.identity
    if suffix == "txt":  # the plan has its own copy
        assert [item.prompt for item in read_unit(plan.unit(0), plan.spec)] == ["a"]
    else:
        with pytest.raises(InputError, match="is not what it was"):
            list(read_unit(plan.unit(0), plan.spec))


def test_identity_does_not_depend_on_folder_and_time(tmp_path: Path) -> None:
    plans = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / folder / "a.parquet")
        path = [write(tmp_path / folder / "a.txt", "x\n"), str(tmp_path / folder / "a.parquet")]
        plans.append(plan_input(make_config(input__path=path), NUM_SCALES).identity)
    assert plans[0] == plans[1]


def test_units_are_capped_by_raw_pixels(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x\n" * 1000)
    config = make_config(input__path=path, output__unit_rows=1000)
    assert plan_input(config, NUM_SCALES, max_image_pixels=1024 * 1024).identity.prompts_per_unit == 500_000_000 // (
        3 * 1024 * 1024
    )
    several = make_config(input__path=path, output__unit_rows=1000, sampling__images_per_prompt=10)
    assert plan_input(several, NUM_SCALES, max_image_pixels=1024 * 1024).identity.prompts_per_unit == 15


def test_only_the_named_requests_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a\nb\nc\n")
    plan = plan_input(make_config(input__path=path), NUM_SCALES)
    unit = dataclasses.replace(plan.unit(0), only=frozenset({(1, 0)}))
    assert [item.key for item in read_unit(unit, plan.spec)] == [(1, 0)]


def test_parquet_values_that_python_cannot_hold(tmp_path: Path) -> None:
    prompts = pa.array([b"fine", b"na\xefve", b"fine too"]).view(pa.string())
    dates = pa.array([0, 0, 10**7], pa.int32()).view(pa.date32())
    pq.write_table(pa.table({"prompt": prompts, "day": dates}), tmp_path / "a.parquet")
    failures = failures_of(str(tmp_path / "a.parquet"))
    assert sorted(failures) == [1, 2] and "cannot be read" in failures[1]


def test_a_disk_that_cannot_be_read_is_no_damaged_file() -> None:
    """A replica that meets it is not told that the input is bad."""

    class Unreadable(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(StorageError, match=r"Cannot read a\.parquet: Input/output error"):
        open_parquet(Unreadable(b"x" * 100), "a.parquet")
