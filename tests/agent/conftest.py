"""The remote of a run whose first life has begun, and retries that come at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import stamina

from spot_core.store import incarnation
from spot_core.store.posix import PosixTier


@pytest.fixture
def remote(tmp_path: Path, local: PosixTier) -> PosixTier:
    """A remote on which life 1 was claimed."""
    remote = PosixTier(tmp_path / "remote")
    incarnation.claim(local, remote, 0.0)
    return remote


@pytest.fixture
def without_waiting() -> Iterator[None]:
    """What is retried is so at once, three times."""
    with stamina.set_testing(True, attempts=4):
        yield
