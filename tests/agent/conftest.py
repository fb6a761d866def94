"""The remote of a run whose first life has begun."""

from __future__ import annotations

from pathlib import Path

import pytest

from spot_core.store import incarnation
from spot_core.store.posix import PosixTier


@pytest.fixture
def remote(tmp_path: Path, local: PosixTier) -> PosixTier:
    """A remote on which life 1 was claimed."""
    remote = PosixTier(tmp_path / "remote")
    incarnation.claim(local, remote, 0.0)
    return remote
