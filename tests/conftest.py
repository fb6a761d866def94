"""Fixtures shared by the tests of all parts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from spot_core.store.posix import PosixTier
from tests.faultproxy import FaultProxy
from tests.servers import GivenS3Server, OverwritingS3Server, S3Server, TlsS3Server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server over HTTP, started when the first test asks for it."""
    with S3Server() as server:
        yield server


@pytest.fixture(scope="session")
def s3_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsS3Server | GivenS3Server]:
    """An S3 server as in production: over TLS, or the real one that SPOT_TEST_S3_ENDPOINT names."""
    if endpoint := os.environ.get("SPOT_TEST_S3_ENDPOINT"):
        yield GivenS3Server(endpoint)
        return
    with TlsS3Server(tmp_path_factory.mktemp("tls")) as server:
        yield server


@pytest.fixture(scope="session")
def overwriting_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OverwritingS3Server]:
    with OverwritingS3Server(tmp_path_factory.mktemp("overwriting")) as server:
        yield server


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """A bad network in front of that server."""
    with FaultProxy(s3_server.port) as proxy:
        yield proxy


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """Like `tmp_path`, in memory where there is such a folder: for histories with thousands of fsyncs."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def local(tmp_path: Path) -> PosixTier:
    return PosixTier(tmp_path / "local")


@pytest.fixture
def remote(tmp_path: Path) -> PosixTier:
    return PosixTier(tmp_path / "remote")
