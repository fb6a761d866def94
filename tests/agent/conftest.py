"""The folders of a run and its processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spot_core.store import incarnation
from spot_core.store.posix import PosixTier
from tests.agent.place import Place


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    for trainer in place.trainers:
        trainer.close()


@pytest.fixture
def remote(tmp_path: Path, local: PosixTier) -> PosixTier:
    """A remote on which life 1 was claimed."""
    remote = PosixTier(tmp_path / "remote")
    incarnation.claim(local, remote, 0.0)
    return remote
