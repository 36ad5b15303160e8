"""Weights and policies from S3, fetched once a node, however many processes ask at once."""

import errno
import fcntl
import hashlib
import shutil
import uuid
from pathlib import Path

from skipvar.config import StorageConfig
from skipvar.errors import NotFoundError
from skipvar.model.identity import Files, sha256_of_tree
from skipvar.shards.storage import Storage, explain_os_error, open_storage, split_s3
from skipvar.types import Entry

_COPY_BYTES = 4 << 20


def fetch(uri: str, cache_dir: str | Path, config: StorageConfig) -> Path:
    """A local path with the file or folder at `uri`: local ones as they are, `s3://` ones from a cache in `cache_dir`.

    The cache's key holds the objects' ETags, so a changed object is fetched anew. `NotFoundError` where nothing is
    there.
    """
    if not uri.startswith("s3://"):
        return Path(uri)
    bucket, key = split_s3(uri.rstrip("/"))
    storage = open_storage(f"s3://{bucket}", config)
    entries = _entries(storage, key, uri)
    identity = "\n".join([uri, *(f"{entry.name} {entry.size} {entry.version}" for entry in entries)])
    folder = Path(cache_dir) / hashlib.sha256(identity.encode()).hexdigest()[:32]
    target = folder / (key.rpartition("/")[2] or bucket)
    try:
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel frees it when its holder dies
                if not target.exists():  # another process may have fetched it while this one waited
                    _download(storage, entries, key, target)
    except OSError as error:
        raise explain_os_error(error, f"fetch {uri} to {target}") from error
    return target


class StoredFiles(Files):
    """Files of this machine, and objects of S3 by their `s3://` addresses, read as a stream and not kept.

    What was hashed once is not read again: several policies are resolved with one model.
    """

    def __init__(self, config: StorageConfig) -> None:
        self._config = config
        self._hashes: dict[str, str] = {}

    def read(self, uri: str) -> bytes:
        if not uri.startswith("s3://"):
            return super().read(uri)
        storage, key = self._bucket(uri)
        try:
            return storage.read(key)
        except NotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", uri) from error

    def sha256(self, uri: str) -> str:
        if uri not in self._hashes:
            self._hashes[uri] = self._stored_sha256(uri) if uri.startswith("s3://") else super().sha256(uri)
        return self._hashes[uri]

    def _stored_sha256(self, uri: str) -> str:
        storage, key = self._bucket(uri)
        try:
            entries = _entries(storage, key, uri)
        except NotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", uri) from error
        hashes: dict[str, str] = {}
        for entry in entries:
            with storage.open(entry.name) as stream:
                hashes[entry.name.removeprefix(f"{key}/")] = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
        return hashes[key] if key in hashes else sha256_of_tree(hashes)

    def _bucket(self, uri: str) -> tuple[Storage, str]:
        bucket, key = split_s3(uri.rstrip("/"))
        return open_storage(f"s3://{bucket}", self._config), key


def _entries(storage: Storage, key: str, uri: str) -> list[Entry]:
    """The object itself, or the objects of the folder."""
    found = [entry for entry in storage.list(key) if entry.name == key or entry.name.startswith(f"{key}/")]
    exact = [entry for entry in found if entry.name == key]
    entries = exact or [entry for entry in found if not entry.name.endswith("/")]
    if not entries:
        raise NotFoundError(f"Cannot fetch {uri}: there is no such object or folder.")
    return entries


def _download(storage: Storage, entries: list[Entry], key: str, target: Path) -> None:
    """Fetch everything beside the target, and put it in place at once."""
    temporary = target.with_name(f".{uuid.uuid4().hex}")
    try:
        for entry in entries:
            inside = entry.name.removeprefix(key).lstrip("/")
            path = temporary / inside if inside else temporary
            assert path.resolve().is_relative_to(temporary.resolve()), entry.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with storage.open(entry.name) as source, path.open("wb") as copy:
                shutil.copyfileobj(source, copy, _COPY_BYTES)
        temporary.rename(target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
