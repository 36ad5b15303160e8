"""What people may feed the commands, as hypothesis strategies: values, configurations, rows of every format, damage."""

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

from skipvar.config import RunConfig
from skipvar.config_file import _all_keys

SECRET = "geheim-4711"
KEYS = sorted({key for key in _all_keys(RunConfig) if key not in ("input", "output", "output.path", "input.path")})

texts = st.text(st.characters(exclude_characters="\r\n"), max_size=20)
scalars: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400, -(10**30)]),
    st.floats(),
    texts,
    st.sampled_from(
        ["auto", "null", "~", "NaN", "0x_", "1e999", "${x}", "\ud800", "../..", "~nosuchuser/a", "é" * 300]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5) | st.just("\ud800"), inner, max_size=3)
    ),
    max_leaves=6,
)
addresses = st.sampled_from(
    [
        f"http://user:{SECRET}@host:1",
        f"https://host/a?X-Amz-Signature={SECRET}",
        f"user:{SECRET}@host",
        f"s3://bucket/a.txt?sig={SECRET}",
        f"http://host:{SECRET}",
        f"ftp://{SECRET}@host/a.json",
        f"/tmp/nowhere.json?token={SECRET}",
    ]
)
unknown = st.sampled_from(["storage.secret", "aws_key", "model.path.token", "x.y.z", "sampling.cgf", "..", "input.[0]"])
yaml_words = st.sampled_from(
    ["!!int abc", "!!timestamp 2020-13-45", "[", "{a: [}", "&a [*a]", "*b", "!!python/object:os.system x", "- 1", "\t"]
)


def _written(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except ValueError:
        return str(value)


overrides = st.one_of(
    st.tuples(st.sampled_from(KEYS), values.map(_written) | yaml_words | texts).map("=".join),
    st.tuples(st.sampled_from(KEYS), addresses).map("=".join),
    unknown.map(lambda key: f"{key}={SECRET}"),
    texts.map(lambda text: "x" + text),
)
"""One `key=value`, rarely a good one. A secret stands only where it must not be repeated."""

yaml_texts = st.one_of(
    st.dictionaries(st.sampled_from(["sampling", "engine", "storage", "model", "audit", "x"]), values, max_size=3).map(
        _written
    ),
    st.tuples(st.sampled_from(KEYS), yaml_words).map(lambda pair: f"{pair[0].replace('.', ': {')}: {pair[1]}"),
    st.binary(max_size=60).map(lambda data: data.decode("latin-1")),
    st.sampled_from(["[" * 3000, "a: &a [*a]", f"input: {{limit: {'9' * 5000}}}", f"storage: {{secret: {SECRET}}}"]),
)


@dataclass(frozen=True)
class Rows:
    """A file of the input and what is known of it."""

    suffix: str
    data: bytes
    num_rows: int
    """Rows, if the file can be read at all."""
    good: tuple[int, ...]
    """Rows that are good whatever the others are, by position."""


_BAD_CELLS = st.sampled_from([2**63, 10**400, -1, 1e308, True, [], {}, [[1]], "x" * 1_100_000, "\ud800", "", " ", None])
_columns = st.sampled_from(
    ["id", "seed", "cfg", "tau", "negative_prompt", "aspect_ratio", "prompt", "own", "ü", "\ud800"]
)
_GOOD_LINE = '{"prompt": "a good one"}'
_json_rows = st.dictionaries(_columns, _BAD_CELLS | values, max_size=4).map(
    lambda row: json.dumps({"prompt": "x", **row})
)
_bad_lines = st.one_of(
    _json_rows,
    st.sampled_from(
        ["{", "nul", "[1]", "\x00", "[" * 5000, '{"prompt": ' + "[" * 900 + "]" * 900 + "}", '{"prompt": NaN}']
    ),
    st.sampled_from(['{"prompt": "x", "own": ' + "9" * 401 + "}", '{"prompt": "x", "own": ' + "9" * 5000 + "}"]),
)


@st.composite
def _jsonl(draw: st.DrawFn) -> Rows:
    lines = [_GOOD_LINE, *draw(st.lists(st.just(_GOOD_LINE) | _bad_lines, max_size=8))]
    good = tuple(at for at, line in enumerate(lines) if line == _GOOD_LINE)
    return Rows("jsonl", "\n".join(lines).encode(), len(lines), good)


@st.composite
def _txt(draw: st.DrawFn) -> Rows:
    words = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zs", "Zl", "Zp")), min_size=1, max_size=20)
    lines = ["a good one", *draw(st.lists(words | st.just("x" * 1_100_000) | st.just("\x00"), max_size=6))]
    return Rows("txt", "\n".join(lines).encode(), len(lines), (0,))


@st.composite
def _csv(draw: st.DrawFn) -> Rows:
    cells = st.sampled_from(
        ["1", "-1", "x", "", "1e999", "9" * 500, "[3,3]", "true", "0x1", "ü", "nan", '"a ""b"""', '"a,b"']
    )
    names = [
        "prompt",
        *draw(st.lists(st.sampled_from(["id", "seed", "cfg", "tau", "aspect_ratio", "own"]), unique=True)),
    ]
    rows = [
        ["a good one", *[""] * (len(names) - 1)],
        *draw(st.lists(st.lists(cells, min_size=1, max_size=6), max_size=8)),
    ]
    lines = [",".join(row) for row in rows]
    counted = [line for line in lines if line]
    return Rows("csv", "\n".join([",".join(names), *lines]).encode(), len(counted), (0,))


@st.composite
def _parquet(draw: st.DrawFn) -> Rows:
    count = draw(st.integers(1, 8))
    columns: dict[str, pa.Array] = {}
    for name in draw(st.lists(st.sampled_from(["id", "seed", "cfg", "tau", "aspect_ratio", "own"]), unique=True)):
        kind = draw(
            st.sampled_from([pa.int64(), pa.uint64(), pa.float64(), pa.string(), pa.bool_(), pa.null(), pa.binary()])
        )
        low = 0 if kind == pa.uint64() else -5
        cell = {
            pa.string(): st.text(st.characters(blacklist_categories=("Cs",)), max_size=9),
            pa.float64(): st.floats(),
            pa.bool_(): st.booleans(),
            pa.null(): st.none(),
            pa.binary(): st.binary(max_size=5),
        }.get(kind, st.integers(low, 2**63 - 1))
        columns[name] = pa.array(draw(st.lists(cell | st.none(), min_size=count, max_size=count)), kind)
    table = pa.table({"prompt": ["a good one"] * count, **columns})
    sink = pa.BufferOutputStream()
    import pyarrow.parquet as pq

    pq.write_table(table, sink, row_group_size=3, write_page_checksum=True)
    return Rows("parquet", sink.getvalue().to_pybytes(), count, tuple(range(count)) if not columns else ())


rows = st.one_of(_jsonl(), _txt(), _csv(), _parquet())


@st.composite
def damages(draw: st.DrawFn) -> Any:
    """A function from a file's bytes to others."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "empty", "text"]))
    at, count = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 40))
    junk = draw(st.binary(min_size=1, max_size=8))

    def apply(data: bytes) -> bytes:
        where = int(at * len(data))
        if kind == "cut":
            return data[:where]
        if kind == "flip":
            return data[:where] + bytes(byte ^ 0xFF for byte in data[where : where + count]) + data[where + count :]
        if kind == "insert":
            return data[:where] + junk + data[where:]
        return b"" if kind == "empty" else b"not this"

    return apply


@st.composite
def json_damages(draw: st.DrawFn) -> Any:
    """A function from JSON text to JSON with another value somewhere, or without a key."""
    steps = draw(st.lists(st.integers(0, 20), min_size=1, max_size=5))
    value, is_removed = draw(values), draw(st.booleans())

    def apply(data: bytes) -> bytes:
        content = json.loads(data)
        inner: Any = content
        for number, step in enumerate(steps):
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            if not keys:
                break
            key = keys[step % len(keys)]
            child = inner[key]
            if number == len(steps) - 1 or not isinstance(child, dict | list) or not child:
                if is_removed:
                    del inner[key]
                else:
                    inner[key] = value
                break
            inner = child
        return json.dumps(content).encode("utf-8", "surrogatepass")

    return apply
