"""Fixtures shared by the tests of all parts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from spot_core.store.posix import PosixTier
from tests.servers import S3Server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server over HTTP, started when the first test asks for it."""
    with S3Server() as server:
        yield server


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
