"""One S3 server for the tests of this folder; a bucket and a proxy for each test."""

from collections.abc import Iterator

import pytest

from skipvar.config import StorageConfig
from storage.proxy import Proxy
from storage.server import ACCESS_KEY, SECRET_KEY, S3Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3") / "weed")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard chain finds the tests' user, and nothing else."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")


@pytest.fixture
def bucket(server: S3Server, credentials: None) -> str:
    return server.make_bucket()


@pytest.fixture
def config(server: S3Server) -> StorageConfig:
    return StorageConfig(endpoint_url=server.url, retry_seconds=20.0)


@pytest.fixture
def proxy(server: S3Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def proxied(proxy: Proxy) -> StorageConfig:
    """The way through the proxy."""
    return StorageConfig(endpoint_url=proxy.url, retry_seconds=20.0)
