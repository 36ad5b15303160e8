"""Malformed configurations and inputs: one sentence that names key or file, exit 2, and no Ray started for it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.generate import main
from skipvar import checks

BAD_OVERRIDES = {
    "sampling.cgf=3": "did you mean sampling.cfg?",
    "limit=3": "did you mean input.limit?",
    "nonsense": "write key=value",
    "=3": "write key=value",
    "input=3": "expected a section",
    "audit=null": "expected a section",
    "input.limit=-1": "input.limit",
    "input.limit=0": "input.limit",
    "input.limit=1.5": "a whole number",
    "input.limit=[3]": "a whole number",
    "input.path=[]": "input.path",
    "input.path=[3]": "input.path",
    "input.path={a: b}": "input.path",
    "input.path=gs://bucket/x.txt": "s3://",
    "input.path=${missing}": "missing",
    "input.prompt_column=''": "name of a column",
    "output.path=": "output.path",
    "output.path={time}/x": "{date}",
    "output.path=s3://": "bucket",
    "output.image_format=gif": "png, webp, jpeg",
    "output.unit_rows=0": "1 or more",
    "output.unit_rows=many": "a whole number",
    "model.name=emojo": "infinity_2b",
    "model.name=infinity_2b": "model.path",
    "model.path=random:x": "random:SEED",
    "model.dtype=float8": "bfloat16",
    "model.device=tpu": "cuda",
    "sampling.seed=-1": "2^63",
    "sampling.cfg=nan": "sampling.cfg",
    "sampling.cfg=.nan": "sampling.cfg",
    "sampling.cfg=-1": "sampling.cfg",
    "sampling.cfg=[a]": "sampling.cfg",
    "sampling.cfg=[3,": "sampling.cfg",
    "sampling.tau=0": "above 0",
    "sampling.tau=[0.5,0]": "above 0",
    "sampling.tau=[]": "above 0",
    "sampling.top_p=1.2": "from 0 (off) to 1",
    "sampling.top_k=-1": "sampling.top_k",
    "sampling.aspect_ratio=0": "height / width",
    "sampling.aspect_ratio=.inf": "height / width",
    "sampling.images_per_prompt=0": "1 or more",
    "sampling.cfg_insertion_layers=[1]": "negative block numbers",
    "policy=spred": "fixed:<strategy>",
    "policy=fixed:skip_9": "fixed:skip_3",
    "policy=missing.json": "does not exist",
    "engine.batch_size=0": "engine.batch_size",
    "engine.batch_size=true": "engine.batch_size",
    "engine.batch_invariant=maybe": "auto, true or false",
    "engine.fixed_shapes=3.5": "true or false",
    "cluster.address=ray://host:1": "host:port",
    "cluster.replicas.min=0": "cluster.replicas.min",
    "cluster.replicas.max=0": "at least",
    "cluster.cpus_per_replica=0": "1 or more",
    "cluster.gpus_per_replica=-1": "auto",
    "audit.fraction=1.5": "a number from 0 to 1",
    "audit.fraction=-0.1": "a number from 0 to 1",
    "audit.min_ssim=2": "a number from -1 to 1",
    "audit.alpha=0": "a number between 0 and 1",
    "audit.delta=1": "a number between 0 and 1",
    "audit.state=gs://x/y": "s3://",
    "audit.on_alarm=shout": "warn, base, stop",
    "storage.endpoint_url=ftp://x": "http://",
    "storage.retry_seconds=-1": "0 or more",
    "max_error_share=2": "from 0 to 1",
    "max_attempts=0": "1 or more",
    "max_seconds=-5": "above 0",
    # Numbers and dates that YAML itself cannot read, or Python not convert:
    "input.limit=0x_": "a whole number",
    "sampling.seed=!!int abc": "a whole number",
    "sampling.seed=!!timestamp 2020-13-45": "a whole number",
    f"sampling.seed={'9' * 5000}": "a whole number",
    f"input.limit={'9' * 4000}": "up to",
    f"sampling.cfg={'9' * 400}": "a number",
    f"sampling.top_p={'9' * 400}": "a number",
    f"sampling.tau={'[' * 3000}1{']' * 3000}": "sampling.tau",
    "sampling.cfg=1e300": "up to 1e30",
    # Lists and mappings where a scalar is due:
    "sampling.cfg_insertion_layers=[[0]]": "negative block numbers",
    "sampling.cfg_insertion_layers=[{a: 1}]": "sampling.cfg_insertion_layers",
    "sampling.cfg=[[1]]": "sampling.cfg",
    "sampling.tau=[[0.5],0.5]": "sampling.tau",
    "sampling.seed=[[1]]": "a whole number",
    "model.name=[emoji]": "a text",
    "input.path=[[a.txt]]": "a list of these",
    "output.image_format=[png]": "png, webp, jpeg",
    "engine.batch_size=[1]": "auto, a whole number",
    # Beyond what the columns, the cluster and the clocks hold:
    f"model.path=random:{2**63}": "below 2^63",
    "model.path=random:²": "random:SEED",
    f"sampling.seed={2**63}": "2^63",
    "sampling.top_k=3000000000": "up to 2147483647",
    "sampling.images_per_prompt=3000000000": "up to 2147483647",
    "engine.batch_size=3000000000": "up to 4096",
    "engine.pool_images=100000000": "up to 65536",
    f"cluster.cpus_per_replica={2**64}": "up to 2147483647",
    "cluster.gpus_per_replica=.inf": "a share from 0 to 1",
    "storage.retry_seconds=1e300": "up to 1e+09",
    "storage.endpoint_url='http://[::1'": "http://host:port",
    "storage.endpoint_url=http://host:99999": "http://host:port",
    'output.path="a\\0b"': "NUL",
    "input.id_column=a\udcff": "surrogate",  # what a byte that is no UTF-8 becomes on a command line
    f"policy={'x' * 300}.json": "does not exist",
}

SECRET = "geheim"
SECRETS = [
    f"storage.endpoint_url=http://user:{SECRET}@host:1",
    f"storage.endpoint_url=ftp://user:{SECRET}@host:1",
    f"storage.endpoint_url=user:{SECRET}@host",
    f"model.path=user:{SECRET}@host",
    f"input.path=user:{SECRET}@host/prompts.txt",
    f"storage.endpoint_url=http://[{SECRET}@host",
    f"storage.endpoint_url=host/{SECRET[:0]}x?X-Amz-Signature={SECRET}",
    f"storage.secret_access_key={SECRET}",
    f"aws_secret_access_key={SECRET}",
    f"storage={{secret: {SECRET}}}",
    f"storage={SECRET}",
    f"..={SECRET}",
    f"input.path=https://bucket/a.txt?X-Amz-Signature={SECRET}",
    f"input.path=[a.txt,'https://bucket/a.txt?sig={SECRET}']",
    f"model.path=https://host/w.safetensors?token={SECRET}",
    f"model.path=https://{SECRET}@host/w.safetensors",
    f"output.path=ftp://u:{SECRET}@host/x",
    f"cluster.address=ray://u:{SECRET}@host:1",
    f"policy=https://host/p.json?sig={SECRET}",
]
"""Overrides that are refused, with a secret in them that the message must not repeat."""

BAD_FILES = {
    "a: [": "line 2 is not valid YAML",
    "- 3": "must hold keys and values",
    "input: {path: a.txt}\ninput: {path: b.txt}": "duplicate",
    "\tx: 1": "not valid YAML",
    "input:\n  path: a\n path: b": "not valid YAML",
    "\x00": "not valid YAML",
    "inputs: {path: a.txt}": "unknown key inputs",
    "sampling: {cfg: {a: 1}}": "sampling.cfg",
    "sampling: {seed: 0x_}": "not valid YAML",
    "sampling: {seed: !!int abc}": "not valid YAML",
    "sampling: {seed: !!timestamp 2020-13-45}": "not valid YAML",
    f"sampling: {{seed: {'9' * 5000}}}": "not valid YAML",
    "sampling: {tau: " + "[" * 3000 + "]" * 3000 + "}": "nested too deeply",
}


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    """`main` gives exit code 2 and one line that holds `expected`."""
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown.err
    assert expected in shown.err
    assert "Traceback" not in shown.err


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    path = tmp_path / "run.yaml"
    path.write_text(f"input: {{path: {tmp_path}/prompts.txt}}\noutput: {{path: {tmp_path}/out}}\n")
    return path


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_bad_override(override: str, config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, [str(config_file), override], BAD_OVERRIDES[override])


@pytest.mark.parametrize("override", SECRETS)
def test_no_secret_is_repeated(override: str, config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config_file), override]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown.err
    assert SECRET not in shown.out + shown.err


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "null"),
        (True, "true"),
        ("two\nlines", "two lines"),
        ("x" * 200, "x" * 97 + "..."),
        pytest.param(10**5000, "a number of thousands of digits", id="digits"),
        ("s3://bucket/a.txt", "s3://bucket/a.txt"),
        ("prompts/a?.txt", "prompts/a?.txt"),
        ("http://u:p@host/x", "http://...@host/x"),
        ("http://u:p/@q@host/x?sig=1", "http://...@host/x?..."),
        (["https://a/b?c", 1], "['https://a/b?..."),
    ],
    ids=str,
)
def test_what_of_a_value_may_be_shown(value: object, expected: str) -> None:
    assert checks.shown(value) == expected


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_file(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    refused(capsys, [str(tmp_path / "bad.yaml")], BAD_FILES[text])


def test_file_that_is_missing_or_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, [str(tmp_path / "none.yaml")], "does not exist")
    refused(capsys, ["/dev/zero"], "is a device")
    refused(capsys, [str(tmp_path)], "cannot be read")


def test_credentials_in_an_endpoint_are_refused_and_not_shown(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(config_file), "storage.endpoint_url=http://user:geheim@host:1"]) == 2
    assert "geheim" not in capsys.readouterr().err


def test_no_arguments_are_a_usage_error() -> None:
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:8265", "nonsense"])
def test_a_cluster_that_does_not_answer(
    address: str, config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    refused(capsys, [str(config_file), "model.path=random:0"], address)


BAD_INPUTS: dict[str, tuple[bytes, str]] = {
    "missing.txt": (b"", "does not exist"),
    "empty.txt": (b"", "no rows"),
    "blank.txt": (b"\n  \n\n", "no rows"),
    "picture.png": (b"\x89PNG", "accepted are .txt"),
    "noending": (b"a cat\n", "accepted are .txt"),
    "latin.txt": (b"caf\xe9\n", "UTF-8"),
    "utf16.txt": ("a cat\n".encode("utf-16"), "UTF-8"),
    "other.csv": (b"caption,x\na,b\n", "no column 'prompt'"),
    "header.csv": (b"prompt\n", "no rows"),
    "empty.csv": (b"", "empty.csv"),
    "twice.csv": (b"prompt,x,x\na,b,c\n", "twice.csv"),
    "latin.csv": (b"prompt\ncaf\xe9\n", "UTF-8"),
    "other.jsonl": (b'{"caption": "a"}\n', "no column 'prompt'"),
    "empty.jsonl": (b"", "no rows"),
    "latin.jsonl": (b'{"prompt": "caf\xe9"}\n', "UTF-8"),
    "text.parquet": (b"a cat\n", "Parquet"),
    "short.parquet": (b"PAR1", "Parquet"),
    "cut.parquet": (b"PAR1" + b"\x00" * 100 + b"\xff\xff\x00\x00PAR1", "Parquet"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(name: str, config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file.parent / name
    content, expected = BAD_INPUTS[name]
    if name != "missing.txt":
        path.write_bytes(content)
    refused(capsys, [str(config_file), f"input.path={path}"], expected)


def test_bad_parquet_columns(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file.parent / "a.parquet"
    pq.write_table(pa.table({"caption": ["a"]}), path)
    refused(capsys, [str(config_file), f"input.path={path}"], "no column 'prompt'")
    pq.write_table(pa.table({"prompt": [1, 2]}), path)
    refused(capsys, [str(config_file), f"input.path={path}"], "must be text")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    refused(capsys, [str(config_file), f"input.path={path}"], "no rows")


def test_inputs_that_do_not_go_together(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config_file.parent
    (folder / "a.csv").write_text("prompt,x\na,1\n")
    pq.write_table(pa.table({"prompt": ["a"], "x": [[1]]}), folder / "b.parquet")
    refused(capsys, [str(config_file), f"input.path={folder}/*.tsv"], "matches no file")
    refused(capsys, [str(config_file), f"input.path={folder}"], "is a folder")
    refused(capsys, [str(config_file), f"input.path=[{folder}/a.csv,{folder}/b.parquet]"], "another type")
    refused(capsys, [str(config_file), f"input.path={folder}/a.csv", "input.id_column=name"], "input.id_column")


ECHOED = [
    "https://user:geheim@host/a.txt",
    "/tmp/a.txt?X-Amz-Signature=geheim",
    "s3://bucket/a.txt?X-Amz-Signature=geheim",
    "s3://user:geheim@bucket/a.txt",
    "http://host:geheim/a",
    "http://host/#geheim",
]


@pytest.mark.parametrize("address", ECHOED)
@pytest.mark.parametrize("key", ["input.path", "model.path", "output.path", "policy", "storage.endpoint_url"])
def test_no_message_repeats_what_an_address_hides(
    key: str, address: str, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert SECRET not in checks.message_of(f"{key}: {address} cannot be read; give another.")
    if (key, address[0]) != ("output.path", "/"):  # a good name of a folder
        assert main([str(config_file), f"{key}={address}"]) == 2
        shown = capsys.readouterr()
        assert SECRET not in shown.out + shown.err and shown.err.startswith("error: ")


def test_what_has_no_key_may_be_a_secret(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argument in (SECRET, f"aws_secret_access_key: {SECRET}", f"storage.region.x={SECRET}"):
        refused(capsys, [str(config_file), argument], "")
        main([str(config_file), argument])
        assert SECRET not in capsys.readouterr().err
    refused(capsys, [str(config_file), "input.limit"], "'input.limit' is not understood; write key=value")
    with pytest.raises(SystemExit) as ended:
        main([str(config_file), f"--no-such-option={SECRET}"])
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and shown.startswith("error: ") and shown.count("\n") == 1 and SECRET not in shown


def test_messages_are_cut_and_say_their_end() -> None:
    text = checks.message_of("begin " + "x" * 5000 + " end.\nsecond")
    assert len(text) <= checks.MESSAGE_CHARACTERS and text.startswith("begin") and text.endswith("end. second")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("{file}", "cannot be a folder"),
        ("{file}/deeper/out", "cannot be a folder"),
        ("~nosuchuser/out", "its user is not known"),
        ("/tmp/" + "x" * 300, "File name too long"),
        ("/tmp/" + "y/" * 3000, "File name too long"),
    ],
)
@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_an_output_that_cannot_be(
    path: str, expected: str, option: list[str], config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = path.replace("{file}", str(config_file))
    refused(capsys, [str(config_file), f"output.path={path}", "model.path=random:0", *option], expected)


def test_more_images_than_a_unit_holds(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["model.path=random:0", "sampling.images_per_prompt=2000000000"]
    refused(capsys, [str(config_file), *overrides], "do not fit output.max_file_bytes")
