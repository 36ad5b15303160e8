"""S3 as storage, against a real server: the interface, the messages, inputs, the cache, whole datasets."""

import dataclasses
import json
import multiprocessing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shards.making import NUM_SCALES, Job, make_config, make_dataset, read_all, write

from jobs.export import main as export_main
from jobs.verify import main as verify_main
from skipvar.config import StorageConfig
from skipvar.distributed.opening import open_writable
from skipvar.errors import InputError, NotFoundError, StorageError
from skipvar.shards.cache import fetch
from skipvar.shards.lease import acquire
from skipvar.shards.prompts import plan_input
from skipvar.shards.storage import Storage, open_storage
from skipvar.types import Request
from storage.proxy import Fault, Proxy
from storage.server import POWERLESS_KEY, SECRET_KEY, S3Server


@pytest.fixture
def storage(bucket: str, config: StorageConfig) -> Storage:
    return open_storage(f"s3://{bucket}/some/prefix", config)


def test_put_read_list_replace_delete(storage: Storage) -> None:
    storage.check_writable()
    assert list(storage.list()) == []
    assert storage.put_if_absent("data/b", b"1") and storage.put_if_absent("data/a", b"22")
    assert not storage.put_if_absent("data/a", b"3")
    assert [(entry.name, entry.size) for entry in storage.list("data/")] == [("data/a", 2), ("data/b", 1)]
    version = next(storage.list("data/a")).version
    storage.replace("data/a", b"0123456789")
    assert next(storage.list("data/a")).version != version
    with storage.open("data/a") as file:
        assert file.seek(2) == 2 and file.read(3) == b"234" and file.read() == b"56789"
        assert file.seek(-1, 2) == 9 and file.read() == b"9"
    assert storage.read("data/a") == b"0123456789"
    storage.delete("data/a")
    storage.delete("data/a")
    assert not list(storage.list("data/a"))
    for read in (storage.read, storage.open):
        with pytest.raises(NotFoundError, match="there is no such object"):
            read("data/a")


def test_listings_of_many_pages(storage: Storage) -> None:
    names = [f"data/{i:04d}" for i in range(1100)]
    for name in names:
        storage.replace(name, b"")
    assert [entry.name for entry in storage.list("data/")] == names


def told(storage: Storage) -> str:
    """The message of a write check that fails."""
    with pytest.raises(StorageError) as error:
        storage.check_writable()
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message and SECRET_KEY not in message
    return message


def test_a_bucket_that_is_missing(bucket: str, config: StorageConfig) -> None:
    assert "the bucket does not exist; create it" in told(open_storage("s3://no-such-bucket/x", config))


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "the secret key is wrong"),
        ("AWS_ACCESS_KEY_ID", "unknown", "does not know this access key"),
        ("AWS_ACCESS_KEY_ID", POWERLESS_KEY, "access denied; give these credentials the right"),
        ("AWS_ACCESS_KEY_ID", None, "no AWS credentials were found"),
    ],
)
def test_credentials_that_do_not_work(
    bucket: str, config: StorageConfig, monkeypatch: pytest.MonkeyPatch, name: str, value: str | None, remedy: str
) -> None:
    if value is None:
        monkeypatch.delenv(name)
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    else:
        monkeypatch.setenv(name, value)
    assert remedy in told(open_storage(f"s3://{bucket}/x", config))


@pytest.mark.parametrize(
    ("status", "code", "remedy"),
    [
        (400, "ExpiredToken", "the credentials have expired; renew them"),
        (403, "RequestTimeTooSkewed", "clock differs too much"),
        (301, "PermanentRedirect", "set storage.region"),
        (507, "InsufficientStorage", "disks are full"),
        (418, "Teapot", "answered Teapot"),
    ],
)
def test_answers_that_no_patience_mends(
    bucket: str, proxy: Proxy, proxied: StorageConfig, status: int, code: str, remedy: str
) -> None:
    proxy.script(*[Fault(answer=(status, code))] * 10)
    assert remedy in told(open_storage(f"s3://{bucket}/x", proxied))


def test_an_endpoint_that_is_gone(bucket: str) -> None:
    storage = open_storage(f"s3://{bucket}/x", StorageConfig(endpoint_url="http://127.0.0.1:9", retry_seconds=2))
    with pytest.raises(StorageError, match=r"http://127\.0\.0\.1:9 did not answer properly for \d+ s") as error:
        storage.put_if_absent("a", b"")
    assert "run the same command again" in str(error.value)


def test_an_endpoint_that_takes_nothing_is_told_without_the_run_s_patience(
    bucket: str, proxy: Proxy, proxied: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skipvar.distributed.opening.START_PATIENCE_SECONDS", 1.0)
    proxy.choose = lambda method, path: Fault(answer=(503, "SlowDown")) if method == "PUT" else Fault()
    with pytest.raises(StorageError, match=r"did not answer properly for \d+ s"):
        open_writable(f"s3://{bucket}/x", dataclasses.replace(proxied, retry_seconds=3600.0))


def test_an_endpoint_that_ignores_conditions(bucket: str, proxy: Proxy, proxied: StorageConfig) -> None:
    proxy.script(Fault(answer=(200, "OK")), Fault(answer=(200, "OK")))
    assert "ignores `If-None-Match: *`" in told(open_storage(f"s3://{bucket}/x", proxied))


def test_inputs_of_every_format_and_globs(tmp_path: Path, bucket: str, config: StorageConfig) -> None:
    root = open_storage(f"s3://{bucket}", config)
    root.replace("in/a.txt", b"t0\nt1\n")
    root.replace("in/b.csv", b'prompt,n\n"c\n0",1\nc1,2\n')
    root.replace("in/c.jsonl", b'{"prompt": "j0", "n": 5}\nbroken\n')
    pq.write_table(pa.table({"prompt": ["p0", "p1"], "n": [8, 9]}), tmp_path / "d.parquet")
    root.replace("in/deep/er/d.parquet", (tmp_path / "d.parquet").read_bytes())
    root.replace("in/deep/er/notes.md", b"x")
    local = write(tmp_path / "e.txt", "l0\n")
    path = [f"s3://{bucket}/in/*.[tc]*", f"s3://{bucket}/in/c.jsonl", f"s3://{bucket}/in/**/*.parquet", local]
    job_config = make_config(input__path=path, storage=config, output__unit_rows=3)
    items = read_all(job_config)
    prompts = [item.prompt for item in items if isinstance(item, Request)]
    assert prompts == ["t0", "t1", "c\n0", "c1", "j0", "p0", "p1", "l0"]
    plan = plan_input(job_config, NUM_SCALES)
    assert plan.identity.files[3]["etag"]
    root.replace("in/a.txt", b"t0\nt2\n")
    assert plan_input(job_config, NUM_SCALES).identity != plan.identity
    for pattern in (f"s3://{bucket}/in/*.parquet", f"s3://{bucket}/in/none.txt", f"s3://{bucket}"):
        with pytest.raises(InputError, match=bucket):
            plan_input(make_config(input__path=pattern, storage=config), NUM_SCALES)


def _fetch(uri: str, folder: str, config: StorageConfig) -> str:
    return str(fetch(uri, folder, config))


def files(folder: Path) -> dict[str, bytes]:
    """All that lies in a folder, by relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_weights_are_fetched_once_by_many(tmp_path: Path, bucket: str, proxy: Proxy, proxied: StorageConfig) -> None:
    root = open_storage(f"s3://{bucket}", proxied)
    folder = tmp_path / "weights"
    (folder / "sub").mkdir(parents=True)
    for name, size in (("a.safetensors", 3_000_000), ("sub/b.json", 10)):
        (folder / name).write_bytes(bytes(i % 251 for i in range(size)))
        root.replace(f"models/w/{name}", (folder / name).read_bytes())
    root.replace("models/w2/other", b"not to be fetched")
    proxy.requests.clear()
    arguments = (f"s3://{bucket}/models/w", str(tmp_path / "cache"), proxied)
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        [path] = set(pool.starmap(_fetch, [arguments] * 4))
    assert files(Path(path)) == files(folder)
    assert sum(method == "GET" and "a.safetensors" in path for method, path in proxy.requests) == 1
    one = fetch(f"s3://{bucket}/models/w/sub/b.json", tmp_path / "cache", proxied)
    assert one.name == "b.json" and one.read_bytes() == (folder / "sub/b.json").read_bytes()
    root.replace("models/w/sub/b.json", b"changed")
    assert fetch(f"s3://{bucket}/models/w/sub/b.json", tmp_path / "cache", proxied).read_bytes() == b"changed"
    everything = fetch(f"s3://{bucket}", tmp_path / "cache", proxied)  # a bucket may be a model's folder
    assert (everything / "models/w2/other").read_bytes() == b"not to be fetched"
    with pytest.raises(NotFoundError):
        fetch(f"s3://{bucket}/models/nothing", tmp_path / "cache", proxied)
    assert not [found for found in (tmp_path / "cache").rglob(".*") if found.name != ".lock"]


def test_a_dataset_on_s3_is_the_local_one(
    tmp_path: Path, bucket: str, config: StorageConfig, server: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [f"prompt {i}" + (" bad" if i % 7 == 3 else "") for i in range(30)]
    (tmp_path / "local").mkdir()
    local = make_dataset(tmp_path / "local", prompts)
    uri = f"s3://{bucket}/out"
    remote = make_dataset(tmp_path, prompts, output__path=uri, storage=config)
    lease = acquire(remote.storage, 5)
    assert lease.beat()
    lease.release()
    hashes = [made_again(job) for job in (local, remote)]
    assert hashes[0] == hashes[1] and remote.record.fingerprint == local.record.fingerprint
    assert verify_main([uri, "--full", "--endpoint-url", server.url]) == 0
    assert "26 images and 4 errors" in capsys.readouterr().out
    assert export_main([uri, "--to", "geneval", str(tmp_path / "g"), "--endpoint-url", server.url]) == 0
    resumed = Job(remote.config)
    assert resumed.record.is_resumed and resumed.make_units() == []
    written = b"".join(remote.storage.read(entry.name) for entry in remote.storage.list())
    assert SECRET_KEY.encode() not in written and json.loads(remote.storage.read("_run.json"))


def made_again(job: Job) -> list[str]:
    """Every unit made again, which changes nothing: the published hashes."""
    before = list(job.storage.list("data/"))
    again = [job.make_unit(job.plan.unit(index)) for index in range(job.plan.num_units)]
    assert all(report.same_content for report in again) and list(job.storage.list("data/")) == before
    return [job.content_hash(index) for index in range(job.plan.num_units)]


def test_own_runs_do_not_meet_in_one_bucket(tmp_path: Path, bucket: str, config: StorageConfig) -> None:
    for name in ("a", "ab"):
        (tmp_path / name).mkdir()
        make_dataset(tmp_path / name, ["x", name], output__path=f"s3://{bucket}/{name}", storage=config)
    listed = [entry.name for entry in open_storage(f"s3://{bucket}/a", config).list("data/")]
    assert listed == ["data/unit-000000000.parquet"]
    assert dataclasses.is_dataclass(config)
