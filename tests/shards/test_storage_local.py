"""A local folder as storage: all or nothing, once, and one sentence when it cannot."""

import errno
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from skipvar.config import StorageConfig
from skipvar.errors import ConfigError, NotFoundError, StorageError
from skipvar.shards import storage as storage_module
from skipvar.shards.cache import fetch
from skipvar.shards.storage import LocalStorage, open_storage


def test_put_read_list_replace_delete(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "out"))
    assert list(storage.list()) == []
    assert storage.put_if_absent("data/b", b"1") and storage.put_if_absent("data/a", b"22")
    assert not storage.put_if_absent("data/a", b"3")
    storage.put_if_absent("_run.json", b"x")
    assert [(entry.name, entry.size) for entry in storage.list("data/")] == [("data/a", 2), ("data/b", 1)]
    assert [entry.name for entry in storage.list("data/b")] == ["data/b"]
    assert [entry.name for entry in storage.list()] == ["_run.json", "data/a", "data/b"]
    storage.replace("data/a", b"new")
    with storage.open("data/a") as file:
        assert file.seek(1) == 1 and file.read() == b"ew"
    storage.delete("data/a")
    storage.delete("data/a")
    assert not list(storage.list("data/a"))
    with pytest.raises(NotFoundError, match="there is no such file"):
        storage.read("data/a")
    storage.check_writable()
    assert [entry.name for entry in storage.list()] == ["_run.json", "data/b"]


def test_an_empty_folder_goes_with_its_last_file_while_others_write_there(tmp_path: Path) -> None:
    def put_and_delete(name: str) -> None:
        storage = LocalStorage(str(tmp_path))
        for _ in range(100):
            assert storage.put_if_absent(f"folder/{name}", b"x")
            storage.delete(f"folder/{name}")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(put_and_delete, "abc"))
    assert not (tmp_path / "folder").exists()


def _put(folder: str, byte: int) -> bool:
    return LocalStorage(folder).put_if_absent("data/x", bytes([byte]) * 1_000_000)


def test_of_many_processes_one_publishes(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        won = pool.starmap(_put, [(str(tmp_path), i) for i in range(12)])
    assert won.count(True) == 1
    assert set(LocalStorage(str(tmp_path)).read("data/x")) == {won.index(True)}


def test_what_dead_writers_left_is_cleaned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"""
import os, signal
from skipvar.shards.storage import LocalStorage
import skipvar.shards.storage as module
module.os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
LocalStorage({str(tmp_path)!r}).put_if_absent("data/x", b"never seen")
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert len(list((tmp_path / "_tmp").iterdir())) == 1
    assert not (tmp_path / "data" / "x").exists()
    monkeypatch.setattr(storage_module, "YOUNG_SECONDS", -1.0)
    with LocalStorage(str(tmp_path))._temporary(b"in use") as alive:
        LocalStorage(str(tmp_path))
        assert list((tmp_path / "_tmp").iterdir()) == [alive]


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "the disk is full; free space"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permission denied; grant"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_trouble_is_one_sentence_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str
) -> None:
    storage = LocalStorage(str(tmp_path))

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(storage_module.os, "fsync", fail)
    with pytest.raises(StorageError) as error:
        storage.put_if_absent("data/x", b"1")
    assert remedy in str(error.value) and str(error.value).endswith(".") and "data/x" in str(error.value)
    with pytest.raises(StorageError, match=r"_run\.json"):
        storage.replace("_run.json", b"1")
    monkeypatch.undo()
    assert not list(storage.list("data/x")) and not list((tmp_path / "_tmp").iterdir())


def test_a_full_disk(tmp_path: Path) -> None:
    """A real one: a tiny tmpfs, where this may be mounted."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        storage = LocalStorage(str(folder))
        with pytest.raises(StorageError, match="the disk is full"):
            storage.put_if_absent("data/x", bytes(2_000_000))
        assert not list(storage.list("data/x")) and storage.put_if_absent("data/y", b"1")
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(StorageError, match="a part of the path is a file"):
        LocalStorage(str(tmp_path / "out")).check_writable()


def test_unknown_kinds_of_location() -> None:
    with pytest.raises(ConfigError, match="'gs://' is no known kind"):
        open_storage("gs://bucket/x", StorageConfig())
    for uri in ("s3://", "s3://key:secret@bucket/x"):
        with pytest.raises(ConfigError) as error:
            open_storage(uri, StorageConfig())
        assert "secret" not in str(error.value)
    with pytest.raises(ConfigError) as error:
        open_storage("s3://bucket", StorageConfig(endpoint_url="http://key:secret@host"))
    assert "secret" not in str(error.value)


def test_local_files_are_fetched_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(b"weights")
    assert fetch(str(path), tmp_path / "cache", StorageConfig()) == path


def test_a_folder_that_lets_nothing_go_can_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: LocalStorage, name: str) -> None:
        raise StorageError("Cannot delete: permission denied.")

    monkeypatch.setattr(LocalStorage, "delete", refuse)
    LocalStorage(str(tmp_path)).check_writable()
