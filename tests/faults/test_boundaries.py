"""Every write that others rely on, struck just before and just after it becomes visible: the same command completes it.

How the table reads: a row is an object that a session publishes, with the prefix of its name and the way it is written.
Its columns are the moment (`before`: the bytes are written, but under no name yet; `after`: they stand under their
name, and the writer has not been told so) times the fault:

* kill: SIGKILL of the process, in that very system call;
* full disk: that call says ENOSPC (from then on, each time);
* cut connection: to a real S3 server, through a proxy that breaks every such request half way (before), or lets the
  server do its work and swallows the answer (after), until the session gives up.

A cell is one test: a session meets the fault and ends (the process dies, or exit 4), then the same command runs again
without it and must end with exit 3 (two prompts of eight are made to fail) and the dataset of a run that nothing
disturbed: the same rows and pixels, the same error rows, none twice, `verify` content, and nothing in `_tmp/`.

`make test` plays the cells of REDUCED, `make test-faults` all.
"""

import io
import itertools
import multiprocessing
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq
import pytest
from storage.proxy import Fault, Proxy
from storage.server import S3Server

from faults.running import rows
from faults.session import PROMPTS, Blow, killed, make_config, session
from skipvar.config import StorageConfig
from skipvar.shards.storage import open_storage
from skipvar.shards.verify import verify

Method = Literal["put_if_absent", "replace"]
When = Literal["before", "after"]

BOUNDARIES: dict[str, tuple[Method, str]] = {
    "lease": ("put_if_absent", "_lease/"),
    "run begins": ("put_if_absent", "_run.json"),
    "input": ("put_if_absent", "_input/"),
    "error file": ("put_if_absent", "errors/"),
    "data file": ("put_if_absent", "data/"),
    "run ends": ("replace", "_run.json"),
    "success": ("replace", "_SUCCESS"),
}
MOMENTS: tuple[When, When] = ("before", "after")
REDUCED = {
    ("error file", "after", "kill"), ("data file", "before", "kill"), ("run ends", "after", "kill"),
    ("input", "before", "full disk"), ("data file", "after", "full disk"), ("success", "before", "full disk"),
    ("lease", "after", "cut"), ("data file", "after", "cut"),
}  # fmt: skip


def cells(kind: str) -> list[object]:
    """The cells of one fault; those that are not in REDUCED are marked as long."""
    found: list[object] = []
    for row, when in itertools.product(BOUNDARIES, MOMENTS):
        marks = [] if (row, when, kind) in REDUCED else [pytest.mark.faults]
        found.append(pytest.param(row, when, marks=marks, id=f"{row}, {when}"))
    return found


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[object, object]:
    folder = tmp_path_factory.mktemp("calm")
    assert session(make_config(folder, str(folder / "out"))) == 3
    return dict(rows(str(folder / "out")))


def check_whole(uri: str, calm: dict[object, object], storage: StorageConfig | None = None) -> None:
    """The dataset is that of an undisturbed run, and its error rows stand once in the files that count."""
    assert rows(uri, storage) == calm
    opened = open_storage(uri, storage or StorageConfig())
    named = []
    for entry in opened.list("data/"):
        metadata = pq.read_metadata(io.BytesIO(opened.read(entry.name))).metadata or {}
        named.append(metadata[b"skipvar.errors"].decode())
    failed = [row["position"] for name in named for row in pq.read_table(io.BytesIO(opened.read(name))).to_pylist()]
    assert sorted(failed) == [at for at, prompt in enumerate(PROMPTS) if "fail" in prompt]
    assert verify(opened, full=True).is_whole


@pytest.mark.parametrize(("row", "when"), cells("kill"))
def test_killed(row: str, when: When, calm: dict[object, object], tmp_path: Path) -> None:
    method, prefix = BOUNDARIES[row]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults.session"])
    blow = Blow("kill", method, prefix, when)
    process = context.Process(target=killed, args=(str(tmp_path), str(tmp_path / "out"), blow))
    process.start()
    process.join(timeout=900)
    assert process.exitcode == -9
    assert session(make_config(tmp_path, str(tmp_path / "out"))) == 3
    check_whole(str(tmp_path / "out"), calm)
    assert not list((tmp_path / "out" / "_tmp").iterdir())


@pytest.mark.parametrize(("row", "when"), cells("full disk"))
def test_disk_full(row: str, when: When, calm: dict[object, object], tmp_path: Path) -> None:
    method, prefix = BOUNDARIES[row]
    config = make_config(tmp_path, str(tmp_path / "out"))
    assert session(config, Blow("full disk", method, prefix, when)) == 4
    assert session(config) == 3
    check_whole(str(tmp_path / "out"), calm)
    assert not list((tmp_path / "out" / "_tmp").iterdir())


@pytest.mark.parametrize(("row", "when"), cells("cut"))
def test_cut_off(
    row: str, when: When, calm: dict[object, object], tmp_path: Path, bucket: str, server: S3Server, proxy: Proxy
) -> None:
    prefix = BOUNDARIES[row][1]
    first = 2 if row == "run ends" else 1  # the second write of `_run.json`
    num_seen = 0

    def choose(found: str, path: str) -> Fault:
        nonlocal num_seen
        if found != "PUT" or f"/out/{prefix}" not in path:
            return Fault()
        num_seen += 1
        if num_seen < first:
            return Fault()
        return Fault(cut_request=0.5) if when == "before" else Fault(cut_response=0.0)

    uri = f"s3://{bucket}/out"
    through = StorageConfig(endpoint_url=proxy.url, retry_seconds=1.0, lease_stale_seconds=3.0)
    proxy.choose = choose
    assert session(make_config(tmp_path, uri, through)) == 4
    assert num_seen >= first
    proxy.choose = lambda method, path: Fault()
    assert session(make_config(tmp_path, uri, through)) == 3
    check_whole(uri, calm, StorageConfig(endpoint_url=server.url))
