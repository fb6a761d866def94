"""Fixtures shared by the tests of all parts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import stamina
from hypothesis import settings

from spot_core.store.overflow import PLACE, Overflow
from spot_core.store.posix import PosixTier
from tests.agent.place import Place
from tests.disk import mounted
from tests.faultproxy import FaultProxy
from tests.servers import ENDPOINT, GivenS3Server, OverwritingS3Server, S3Server, TlsS3Server
from tests.sftpserver import SftpServer

# How long one example takes says nothing on a machine that does other work.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

S3_FIXTURES = {"s3_server", "s3_store"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What `make test-s3` runs against any server."""
    for item in items:
        if S3_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.s3)


@pytest.fixture
def without_waiting() -> Iterator[None]:
    """What is retried is so at once, three times."""
    with stamina.set_testing(True, attempts=4):
        yield


@pytest.fixture(scope="session")
def lenient_server() -> Iterator[S3Server]:
    """A real S3 server over HTTP that takes any credentials, started when the first test asks for it."""
    with S3Server() as server:
        yield server


@pytest.fixture(scope="session")
def s3_server(request: pytest.FixtureRequest) -> S3Server | GivenS3Server:
    """A real S3 server over HTTP on this machine: the one that SPOT_TEST_S3_ENDPOINT names, if it is so."""
    given = GivenS3Server(os.environ[ENDPOINT]) if ENDPOINT in os.environ else None
    if given is not None and given.port is not None:
        return given
    server: S3Server = request.getfixturevalue("lenient_server")
    return server


@pytest.fixture(scope="session")
def s3_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsS3Server | GivenS3Server]:
    """An S3 server as in production: over TLS, or the real one that SPOT_TEST_S3_ENDPOINT names."""
    if endpoint := os.environ.get(ENDPOINT):
        yield GivenS3Server(endpoint)
        return
    with TlsS3Server(tmp_path_factory.mktemp("tls")) as server:
        yield server


@pytest.fixture(scope="session")
def overwriting_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OverwritingS3Server]:
    with OverwritingS3Server(tmp_path_factory.mktemp("overwriting")) as server:
        yield server


@pytest.fixture(scope="session")
def sftp_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SftpServer]:
    with SftpServer(tmp_path_factory.mktemp("sftp")) as server:
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


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system in memory of 8 MB for the overflow."""
    with mounted(tmp_path / "memory", "size=8m") as folder:
        monkeypatch.setenv(PLACE, str(folder))
        yield folder


@pytest.fixture
def over(memory: Path, remote: PosixTier) -> Overflow:
    """The overflow of a run on `remote`."""
    return Overflow.of(remote, "an id")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """The folders of a run, with the processes that work on it."""
    place = Place(tmp_path)
    yield place
    for trainer in place.trainers:
        trainer.close()
