"""S3 (AWS, MinIO, SeaweedFS ...) as a `Storage`: a conditional `PutObject` as commit, patience with a lost endpoint."""

import io
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import boto3
import tenacity
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from urllib3.exceptions import HTTPError

from skipvar.checks import message_of
from skipvar.config import StorageConfig
from skipvar.errors import ConfigError, NotFoundError, StorageError
from skipvar.types import Entry

logger = logging.getLogger(__name__)

READ_AHEAD_BYTES = 4 << 20
_PASSING_ERRORS = (BotoConnectionError, HTTPClientError, IncompleteReadError, HTTPError)
"""urllib3's own `HTTPError`: botocore lets it pass where the body of an error's answer is cut."""
_PASSING_CODES = {
    "ConditionalRequestConflict", "OperationAborted", "InternalError", "ServiceUnavailable", "SlowDown",
    "Throttling", "ThrottlingException", "TooManyRequests", "RequestTimeout", "RequestTimeoutException",
    "BadDigest", "IncompleteBody",
}  # fmt: skip
_REMEDIES = {
    "NoSuchBucket": "the bucket does not exist; create it or correct the name",
    "AccessDenied": "access denied; give these credentials the right to list, read, write and delete under this prefix",
    "Forbidden": "access denied; give these credentials the right to list, read, write and delete under this prefix",
    "AllAccessDisabled": "access to the bucket is disabled; ask its owner",
    "InvalidAccessKeyId": "the endpoint does not know this access key; check the AWS credentials",
    "SignatureDoesNotMatch": "the secret key is wrong; check the AWS credentials",
    "ExpiredToken": "the credentials have expired; renew them and run the same command again",
    "TokenRefreshRequired": "the credentials have expired; renew them and run the same command again",
    "InvalidToken": "the session token is not valid; renew the credentials and run the same command again",
    "RequestTimeTooSkewed": "this machine's clock differs too much from the endpoint's; set the clock (NTP)",
    "PermanentRedirect": "the bucket is in another region; set storage.region",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set storage.region",
    "InvalidBucketName": "the bucket's name is not valid; it has 3 to 63 lower-case letters, digits, dots and hyphens",
    "EntityTooLarge": "the object is larger than the endpoint accepts; lower output.unit_rows",
    "QuotaExceeded": "the quota is used up; free space and run the same command again",
    "InsufficientStorage": "the endpoint's disks are full; free space and run the same command again",
}


class S3Storage:
    """Objects under `s3://bucket/prefix`. Credentials come from the standard AWS chain and appear in no message."""

    def __init__(self, uri: str, config: StorageConfig) -> None:
        try:
            parts = urlsplit(uri)
        except ValueError:
            raise ConfigError("An S3 location is no valid address; check its brackets.") from None
        if not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
            raise ConfigError("An S3 location is s3://bucket or s3://bucket/prefix, without keys or options in it.")
        self._bucket = parts.netloc
        self._prefix = parts.path.strip("/") + "/" if parts.path.strip("/") else ""
        self.uri = f"s3://{self._bucket}/{self._prefix}".rstrip("/")
        self._retry_seconds = config.retry_seconds
        try:
            self._client = _client(config)
        except (BotoCoreError, ValueError) as error:
            raise ConfigError(f"The S3 settings are not usable: {error}.") from error
        self._endpoint = _shown_endpoint(self._client.meta.endpoint_url)

    def look(self) -> None:
        """Raise where there is no such bucket (some servers would make one on the first write)."""
        try:
            self._call(f"use {self.uri}", self._client.head_bucket)
        except NotFoundError:
            raise StorageError(f"Cannot use {self.uri}: {_REMEDIES['NoSuchBucket']}.") from None
        except _AccessDenied:
            logger.debug("the bucket of %s may not be looked at; writing will tell whether it may be used", self.uri)

    def check_writable(self) -> None:
        self.look()
        name = f"_probe/{uuid.uuid4().hex}"
        first, second = (self.put_if_absent(name, b"probe") for _ in range(2))
        self.delete(name)
        if not first or second:
            raise StorageError(
                f"The endpoint {self._endpoint} ignores `If-None-Match: *`: two workers could overwrite each other in "
                f"{self.uri}; use one that honours conditional writes (AWS, a current MinIO or SeaweedFS)."
            )

    def list(self, prefix: str = "") -> Iterator[Entry]:
        token: dict[str, str] = {}
        while True:
            page = self._call(
                f"list {self.uri}/{prefix}", self._client.list_objects_v2, Prefix=self._prefix + prefix, **token
            )
            for item in page.get("Contents", ()):
                yield Entry(item["Key"][len(self._prefix) :], item["Size"], item["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def open(self, name: str) -> BinaryIO:
        """Ranged GETs that read `READ_AHEAD_BYTES` ahead; a `StorageError` where the object changes meanwhile."""
        status = self._call_on("read", name, self._client.head_object)

        def get(start: int, stop: int) -> bytes:
            return self._get(name, Range=f"bytes={start}-{stop - 1}", IfMatch=status["ETag"])

        reader = _RangeReader(get, status["ContentLength"])
        return cast(BinaryIO, io.BufferedReader(reader, READ_AHEAD_BYTES))

    def read(self, name: str) -> bytes:
        return self._get(name)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """One whole `PutObject`. A 412 after a cut connection may be our own upload: "already there" all the same."""
        try:
            self._call_on("write", name, self._client.put_object, Body=data, IfNoneMatch="*")
        except _PreconditionFailed:
            return False
        return True

    def replace(self, name: str, data: bytes) -> None:
        self._call_on("write", name, self._client.put_object, Body=data)

    def delete(self, name: str) -> None:
        self._call_on("delete", name, self._client.delete_object)

    def _get(self, name: str, **which: str) -> bytes:
        """The whole object, or a range of it as long as it is the same."""

        def get(**where: str) -> bytes:
            return cast(bytes, self._client.get_object(**where)["Body"].read())

        try:
            return cast(bytes, self._call_on("read", name, get, **which))
        except _PreconditionFailed:
            raise StorageError(
                f"{self.uri}/{name} changed while it was being read; leave inputs alone during a run."
            ) from None

    def _call_on(self, verb: str, name: str, function: Callable[..., Any], **arguments: Any) -> Any:
        """`_call` for one object."""
        return self._call(f"{verb} {self.uri}/{name}", function, Key=self._prefix + name, **arguments)

    def _call(self, what: str, function: Callable[..., Any], **arguments: Any) -> Any:
        """One S3 call; trouble that passes is retried for `storage.retry_seconds`, all else is explained at once."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_passing),
            stop=tenacity.stop_after_delay(self._retry_seconds),
            wait=tenacity.wait_exponential_jitter(initial=0.2, max=10.0, jitter=0.5),
            before_sleep=lambda state: _log_retry(what, state),
            reraise=True,
        )
        started = time.monotonic()
        try:
            return retrying(function, Bucket=self._bucket, **arguments)
        except (ClientError, BotoCoreError, HTTPError, OSError) as error:
            raise self._explain(error, what, time.monotonic() - started) from None  # the cause may hold signed headers

    def _explain(self, error: Exception, what: str, seconds: float) -> StorageError:
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return StorageError(
                f"Cannot {what}: no AWS credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or use a profile or role."
            )
        if _is_passing(error):
            return StorageError(
                f"Cannot {what}: {self._endpoint} did not answer properly for {seconds:.0f} s ({_code(error)}); "
                "check that it is up and that storage.endpoint_url is right, then run the same command again."
            )
        code = _code(error)
        if code in ("NoSuchKey", "404", "NotFound"):
            return NotFoundError(f"Cannot {what}: there is no such object.")
        if code in ("PreconditionFailed", "412"):
            return _PreconditionFailed(what)
        if code == "403":  # HEAD requests have no body to tell the reason
            code = "AccessDenied"
        kind = _AccessDenied if code == "AccessDenied" else StorageError
        return kind(f"Cannot {what}: {_REMEDIES.get(code, f'the endpoint {self._endpoint} answered {code}')}.")


class _PreconditionFailed(StorageError):
    """412: the name is taken (put-if-absent) or the object changed (reads)."""


class _AccessDenied(StorageError):
    """403 without a better reason."""


class _RangeReader(io.RawIOBase):
    """A seekable reader over ranged GETs."""

    def __init__(self, get: Callable[[int, int], bytes], size: int) -> None:
        self._get = get
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readall(self) -> bytes:
        """The rest by one GET (the base class would make hundreds of small ones)."""
        data = self._get(self._at, self._size) if self._at < self._size else b""
        self._at = self._size
        return data

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        if stop <= self._at:
            return 0
        data = self._get(self._at, stop)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _client(config: StorageConfig) -> Any:
    options = Config(
        retries={"mode": "adaptive", "max_attempts": 3},
        connect_timeout=min(5.0, max(1.0, config.retry_seconds / 3)),  # an address where nothing answers at all
        read_timeout=60,
        tcp_keepalive=True,
        max_pool_connections=32,
        # Not every S3 server understands the checksums that boto3 adds by default; the signature covers the body.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path"} if config.endpoint_url else None,
    )
    return boto3.session.Session().client(
        "s3", endpoint_url=config.endpoint_url, region_name=config.region or None, config=options
    )


def _code(error: BaseException) -> str:
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", "?"))
    return type(error).__name__


def _is_passing(error: BaseException) -> bool:
    """Whether the call may succeed later: connection trouble, an overloaded or restarting server, a conflict (409)."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = _code(error)
        return code not in _REMEDIES and (code in _PASSING_CODES or status in (408, 409, 429) or status >= 500)
    return isinstance(error, _PASSING_ERRORS)


def _log_retry(what: str, state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    reason = _code(error) if error else "?"
    logger.warning("could not %s (%s); trying again, attempt %d", message_of(what), reason, state.attempt_number + 1)


def _shown_endpoint(url: str) -> str:
    """The endpoint without anything that could be a secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
