"""Where datasets and inputs live: one small interface over folders and `s3://`; put-if-absent is its only commit."""

import contextlib
import errno
import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from skipvar.config import StorageConfig
from skipvar.errors import ConfigError, NotFoundError, StorageError
from skipvar.types import Entry

TEMPORARY = "_tmp"
PLACE_ATTEMPTS = 5
YOUNG_SECONDS = 5.0
"""A temporary file may be so old before its writer has locked it."""


class Storage(Protocol):
    """A flat space of named objects under one uri. Every trouble is a `StorageError`: a sentence with the remedy."""

    uri: str

    def look(self) -> None:
        """Raise, writing nothing, where it is plain that objects cannot be written here."""

    def check_writable(self) -> None:
        """Show, before any work, that objects can be written here and that put-if-absent is honoured."""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """The objects whose names start with `prefix`, in the order of their names."""

    def open(self, name: str) -> BinaryIO:
        """A seekable reader; `NotFoundError` if there is no such object."""

    def read(self, name: str) -> bytes:
        """The whole object; `NotFoundError` if there is none."""

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Publish the whole object at once, or return False because the name is taken. Durable when it returns."""

    def replace(self, name: str, data: bytes) -> None:
        """Publish the whole object at once, in place of what was there."""

    def delete(self, name: str) -> None:
        """Remove the object; no error if there is none."""


def split_s3(uri: str) -> tuple[str, str]:
    """Bucket and key (or prefix, or pattern) of an `s3://` address."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def open_storage(uri: str, config: StorageConfig) -> Storage:
    """The storage at a local folder or `s3://bucket[/prefix]`. Writes nothing."""
    if uri.startswith("s3://"):
        from skipvar.shards.s3 import S3Storage  # boto3 takes a third of a second to import; local runs do without

        return S3Storage(uri, config)
    if "://" in uri:
        raise ConfigError(
            f"'{uri.split('://')[0]}://' is no known kind of location; give a local path or s3://bucket/prefix."
        )
    return LocalStorage(uri)


def join(uri: str, name: str) -> str:
    """The full uri of a name under a location, for messages."""
    return f"{uri.rstrip('/')}/{name}"


def explain_os_error(error: OSError, what: str) -> StorageError:
    """One sentence with the remedy for an error of the local file system; `what` names the action and the file."""
    remedies = {
        errno.ENOSPC: "the disk is full; free space or give another location, then run the same command again",
        errno.EDQUOT: "the disk quota is used up; free space or give another location, then run the same command again",
        errno.EACCES: "permission denied; grant this user access or give another location",
        errno.EPERM: "the file system does not permit it; grant this user access or give another location",
        errno.EROFS: "the file system is read-only; give another location",
        errno.ENOTDIR: "a part of the path is a file, not a folder; give another location",
        errno.EISDIR: "it is a folder; a file was expected",
        errno.ENAMETOOLONG: "the path is too long; give a shorter one",
    }
    reason = remedies.get(error.errno or 0, error.strerror or type(error).__name__)
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"Cannot {what}: there is no such file.")
    return StorageError(f"Cannot {what}: {reason}.")


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """An error of the local file system becomes a `StorageError`; `what` names the action and the file."""
    try:
        yield
    except OSError as error:
        raise explain_os_error(error, what) from error


class LocalStorage:
    """A folder. An object appears by `link` from a finished temporary file, so no partial one is ever visible."""

    def __init__(self, uri: str) -> None:
        try:
            self.root = Path(uri).expanduser().absolute()
            self.root.exists()
        except (OSError, RuntimeError, ValueError) as error:  # a name too long for any file; an unknown ~user
            is_user = isinstance(error, RuntimeError)
            reason = "its user is not known here" if is_user else getattr(error, "strerror", error)
            raise ConfigError(f"The location {uri[:200]!r} cannot be used: {reason}.") from error
        self.uri = str(self.root)
        self._clean_temporary()

    def look(self) -> None:
        place = next(path for path in (self.root, *self.root.parents) if os.path.lexists(path))
        if not place.is_dir():
            raise ConfigError(
                f"output.path: {self.root} cannot be a folder, since {place} is none; give another location."
            )
        with explained(f"write to {place}"):
            if not os.access(place, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def check_writable(self) -> None:
        name = f"_probe-{uuid.uuid4().hex}"  # in no folder of its own: removing that would race with another run
        try:
            first, second = (self.put_if_absent(name, b"probe") for _ in range(2))
        finally:
            with contextlib.suppress(StorageError):  # a folder may take files and let none go
                self.delete(name)
        if not first or second:
            raise StorageError(
                f"The file system at {self.uri} cannot tell whether a file is there; give another location."
            )

    def list(self, prefix: str = "") -> Iterator[Entry]:
        folder = prefix.rpartition("/")[0]
        with explained(f"list {join(self.uri, folder)}"):
            if folder and (self.root / folder).is_file():
                raise StorageError(f"{join(self.uri, folder)} is a file where a folder is due; restore the folder.")
            found = sorted(self._walk(self.root / folder))
        for name, size, modified in found:
            if name.startswith(prefix) and not name.startswith(f"{TEMPORARY}/"):
                yield Entry(name, size, str(modified))

    def open(self, name: str) -> BinaryIO:
        path = self._path(name)
        with explained(f"read {path}"):
            return path.open("rb")

    def read(self, name: str) -> bytes:
        with explained(f"read {self._path(name)}"), self.open(name) as file:
            return file.read()

    def put_if_absent(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        with explained(f"write {path}"):
            if path.exists():
                return False
            with self._temporary(data) as temporary:
                try:
                    _placed(lambda: os.link(temporary, path), path.parent)
                except FileExistsError:
                    return False
        return True

    def replace(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with explained(f"write {path}"), self._temporary(data) as temporary:
            _placed(lambda: temporary.replace(path), path.parent)

    def delete(self, name: str) -> None:
        path = self._path(name)
        with explained(f"delete {path}"):
            path.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                _sync_folder(path.parent)
        if path.parent != self.root:
            with contextlib.suppress(OSError):  # not empty, or gone already
                path.parent.rmdir()

    def _path(self, name: str) -> Path:
        parts = PurePosixPath(name)
        assert name and not parts.is_absolute() and ".." not in parts.parts, name
        return self.root / parts

    def _walk(self, folder: Path) -> Iterator[tuple[str, int, int]]:
        for parent, _, files in os.walk(folder, onerror=_raise_unless_gone):
            for file in files:
                path = Path(parent, file)
                with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                    status = path.stat()
                    yield path.relative_to(self.root).as_posix(), status.st_size, status.st_mtime_ns

    @contextlib.contextmanager
    def _temporary(self, data: bytes) -> Iterator[Path]:
        """A finished file in `_tmp/`, gone in the end. Its lock shows others that its writer lives."""
        folder = self.root / TEMPORARY
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / uuid.uuid4().hex
        try:
            with path.open("xb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                yield path
        finally:
            path.unlink(missing_ok=True)

    def _clean_temporary(self) -> None:
        """Remove what dead writers left in `_tmp/`: it takes space and nothing refers to it."""
        for path in (self.root / TEMPORARY).glob("*"):
            with contextlib.suppress(OSError):  # BlockingIOError: its writer lives
                if time.time() - path.stat().st_mtime > YOUNG_SECONDS:
                    with path.open("rb") as file:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        path.unlink()


def _raise_unless_gone(error: OSError) -> None:
    """A folder that may not be listed is not an empty one."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _placed(place: Callable[[], object], folder: Path) -> None:
    """Let `place` make an entry of the folder, which whoever deleted its last file may remove at any moment."""
    for attempt in range(PLACE_ATTEMPTS):
        with contextlib.suppress(FileExistsError):  # also where it vanished while Python looked at it
            folder.mkdir(parents=True, exist_ok=True)
        try:
            place()
            _sync_folder(folder)
            return
        except FileNotFoundError:
            if attempt == PLACE_ATTEMPTS - 1:
                raise


def _sync_folder(folder: Path) -> None:
    """Make the folder's new entry survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
