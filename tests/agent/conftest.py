"""The remote of a run whose first life has begun, and a small disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spot_core.store import incarnation
from spot_core.store.posix import PosixTier
from tests.disk import mounted


@pytest.fixture
def remote(tmp_path: Path, local: PosixTier) -> PosixTier:
    """A remote on which life 1 was claimed."""
    remote = PosixTier(tmp_path / "remote")
    incarnation.claim(local, remote, 0.0)
    return remote


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk for the local folder."""
    with mounted(tmp_path / "small", "size=1m") as folder:
        yield folder
