"""Finding and opening the input's files, locally and on S3: paths, globs, lists of these."""

import fnmatch
import glob
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from skipvar.config import StorageConfig
from skipvar.errors import InputError, NotFoundError
from skipvar.shards.storage import Storage, open_storage, split_s3

FORMATS = {".txt": "txt", ".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}
_GLOB = re.compile(r"[*?[]")


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of the input, as it was when the run was planned."""

    uri: str
    size: int
    version: str
    """ETag on S3, modification time in nanoseconds locally."""

    @property
    def name(self) -> str:
        """The last part of its uri, without folders."""
        return PurePosixPath(self.uri).name

    @property
    def format(self) -> str:
        """txt, jsonl, csv or parquet."""
        return FORMATS[PurePosixPath(self.uri).suffix.lower()]

    @property
    def is_on_s3(self) -> bool:
        return self.uri.startswith("s3://")


class Inputs:
    """Access to input files. Cheap to make; S3 clients are made when first needed."""

    def __init__(self, config: StorageConfig) -> None:
        self._config = config
        self._buckets: dict[str, Storage] = {}

    def find(self, path: str | Sequence[str]) -> list[InputFile]:
        """The files that `input.path` names, in its order, those of a glob sorted. `InputError` where there is none."""
        patterns = [path] if isinstance(path, str) else path
        return [file for pattern in patterns for file in self._expand(pattern)]

    def open(self, uri: str) -> BinaryIO:
        """A seekable reader of one input file."""
        if uri.startswith("s3://"):
            bucket, key = split_s3(uri)
            return self._bucket(bucket).open(key)
        try:
            _check_kind(Path(uri).stat().st_mode, uri)  # opening a named pipe would wait for somebody to write
            return Path(uri).open("rb")
        except OSError as error:
            raise InputError(f"{uri} cannot be read: {error.strerror}.") from error

    def _expand(self, pattern: str) -> list[InputFile]:
        found = list(self._expand_s3(pattern) if pattern.startswith("s3://") else _expand_local(pattern))
        if not found:
            kind = "matches no file" if _GLOB.search(pattern) else "does not exist"
            raise InputError(
                f"input.path: {pattern} {kind}; give a txt, jsonl, csv or parquet file, a glob, or a list of these."
            )
        for file in found:
            suffix = PurePosixPath(file.uri).suffix.lower()
            if suffix not in FORMATS:
                raise InputError(
                    f"{file.uri}: files ending in '{suffix}' cannot be read; accepted are .txt, .jsonl, .csv and "
                    ".parquet."
                )
            if file.name.encode("utf-8", "replace").decode() != file.name:  # rows and `_run.json` tell it
                raise InputError(f"{file.uri!r}: the file's name is no valid text (UTF-8); rename the file.")
        return found

    def _expand_s3(self, pattern: str) -> Iterator[InputFile]:
        bucket, key = split_s3(pattern)
        if not key:
            raise InputError(
                f"input.path: {pattern} is a bucket; give a file or a glob, such as {pattern.rstrip('/')}/*.parquet."
            )
        start, parts = _GLOB.split(key)[0], key.split("/")
        try:
            for entry in self._bucket(bucket).list(start):
                is_meant = entry.name == key or (start != key and _matches(entry.name.split("/"), parts))
                if is_meant and not entry.name.endswith("/"):
                    yield InputFile(f"s3://{bucket}/{entry.name}", entry.size, entry.version)
        except NotFoundError as error:
            raise InputError(str(error)) from error

    def _bucket(self, name: str) -> Storage:
        if name not in self._buckets:
            self._buckets[name] = open_storage(f"s3://{name}", self._config)
        return self._buckets[name]


def _expand_local(pattern: str) -> Iterator[InputFile]:
    try:
        pattern = str(Path(pattern).expanduser())
        is_folder = Path(pattern).is_dir()
        names = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (keeps relative and absolute alike)
    except (OSError, RuntimeError, ValueError, re.error) as error:  # a name that is too long, an unknown ~user, a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"input.path: {pattern[:200]!r} cannot be used: {reason}.") from error
    if is_folder:
        raise InputError(
            f"input.path: {pattern} is a folder; give a file in it or a glob, such as {pattern.rstrip('/')}/*.parquet."
        )
    for name in names:
        path = Path(name)
        try:
            if path.is_dir():
                continue
            status = path.stat()
        except OSError as error:
            raise InputError(f"{name} cannot be read: {error.strerror}.") from error
        _check_kind(status.st_mode, name)
        yield InputFile(str(path.absolute()), status.st_size, str(status.st_mtime_ns))


def _check_kind(mode: int, name: str) -> None:
    if not stat.S_ISREG(mode):
        raise InputError(f"{name} is no regular file (a pipe, a device or a folder); copy its content to a file.")


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether an S3 key's parts match a glob's as a path's would: `*` stays within a folder, `**` goes through any
    number."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_matches(names[skipped:], patterns[1:]) for skipped in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])
