"""Weights and policies from S3, fetched once a node, however many processes ask at once."""

import contextlib
import errno
import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from skipvar.config import StorageConfig
from skipvar.errors import NotFoundError
from skipvar.model.identity import Files, sha256_of_tree
from skipvar.shards.storage import Storage, explained, open_storage, split_s3
from skipvar.types import Entry

_COPY_BYTES = 4 << 20


def fetch(uri: str, cache_dir: str | Path, config: StorageConfig) -> Path:
    """A local path with the file or folder at `uri`: local ones as they are, `s3://` ones from a cache in `cache_dir`.

    The cache's key holds the objects' ETags, so a changed object is fetched anew. `NotFoundError` where nothing is
    there.
    """
    stored = _stored(uri, config)
    if stored is None:
        return Path(uri)
    storage, key = stored
    entries = _entries(storage, key, uri)
    identity = "\n".join([uri, *(f"{entry.name} {entry.size} {entry.version}" for entry in entries)])
    folder = Path(cache_dir) / hashlib.sha256(identity.encode()).hexdigest()[:32]
    target = folder / PurePosixPath(uri).name
    with explained(f"fetch {uri} to {target}"):
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel frees it when its holder dies
                if not target.exists():  # another process may have fetched it while this one waited
                    _download(storage, entries, key, target)
    return target


class StoredFiles(Files):
    """Files of this machine, and objects of S3 by their `s3://` addresses, read as a stream and not kept.

    What was hashed once is not read again: several policies are resolved with one model.
    """

    def __init__(self, config: StorageConfig) -> None:
        self._config = config
        self._hashes: dict[str, str] = {}

    def read(self, uri: str) -> bytes:
        stored = _stored(uri, self._config)
        if stored is None:
            return super().read(uri)
        storage, key = stored
        with _missing_as_a_file(uri):
            return storage.read(key)

    def sha256(self, uri: str) -> str:
        if uri not in self._hashes:
            stored = _stored(uri, self._config)
            self._hashes[uri] = super().sha256(uri) if stored is None else _sha256(*stored, uri)
        return self._hashes[uri]


def _stored(uri: str, config: StorageConfig) -> tuple[Storage, str] | None:
    """The bucket and the key of an `s3://` address; None for a file of this machine."""
    if not uri.startswith("s3://"):
        return None
    bucket, key = split_s3(uri.rstrip("/"))
    return open_storage(f"s3://{bucket}", config), key


def _sha256(storage: Storage, key: str, uri: str) -> str:
    hashes: dict[str, str] = {}
    with _missing_as_a_file(uri):
        for entry in _entries(storage, key, uri):
            with storage.open(entry.name) as stream:
                hashes[entry.name.removeprefix(f"{key}/")] = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
    return hashes[key] if key in hashes else sha256_of_tree(hashes)


@contextlib.contextmanager
def _missing_as_a_file(uri: str) -> Iterator[None]:
    """An object that is not there is told as a file is."""
    try:
        yield
    except NotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "there is no such object", uri) from error


def _entries(storage: Storage, key: str, uri: str) -> list[Entry]:
    """The object itself, or the objects of the folder; all of the bucket where the key is empty."""
    found = list(storage.list(key))
    inside = [entry for entry in found if not key or entry.name.startswith(f"{key}/")]
    exact = [entry for entry in found if entry.name == key]
    entries = exact or [entry for entry in inside if not entry.name.endswith("/")]
    if not entries:
        raise NotFoundError(f"Cannot fetch {uri}: there is no such object or folder.")
    return entries


def _download(storage: Storage, entries: list[Entry], key: str, target: Path) -> None:
    """Fetch everything beside the target, and put it in place at once."""
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as folder:
        fetched = Path(folder, "fetched")
        for entry in entries:
            inside = entry.name.removeprefix(key).lstrip("/")
            path = fetched / inside
            assert path.resolve().is_relative_to(fetched.resolve()), entry.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with storage.open(entry.name) as source, path.open("wb") as copy:
                shutil.copyfileobj(source, copy, _COPY_BYTES)
        fetched.rename(target)
