"""The judge of all histories must be able to convict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from spot_core.errors import CorruptCheckpointError
from spot_core.store import incarnation, layout
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.testing.checkpoints import commit_checkpoint
from spot_core.testing.invariants import assert_run_invariants
from tests.trees import tree

ONE, TWO = CheckpointName(1, 10), CheckpointName(1, 20)


def _damage_a_file(local: PosixTier, remote: PosixTier) -> None:
    remote.replace(f"{layout.checkpoint(TWO)}/checkpoint-20/model.bin", b"damaged")


def _lose_a_local_file(local: PosixTier, remote: PosixTier) -> None:
    local.delete([f"{layout.checkpoint(TWO)}/checkpoint-20/state"])


def _damage_a_manifest(local: PosixTier, remote: PosixTier) -> None:
    remote.replace(layout.manifest(ONE), b"{}")


def _commit_without_a_claim(local: PosixTier, remote: PosixTier) -> None:
    commit_checkpoint(local, CheckpointName(2, 5))


def _commit_something_else_under_the_same_name(local: PosixTier, remote: PosixTier) -> None:
    local.delete([layout.manifest(TWO)])
    commit_checkpoint(local, TWO, files={"checkpoint-20/model.bin": b"other"})


def _lose_the_pinned_one(local: PosixTier, remote: PosixTier) -> None:
    remote.delete([layout.manifest(ONE), layout.checkpoint(ONE)])


def _lose_the_durable_one(local: PosixTier, remote: PosixTier) -> None:
    remote.delete([layout.manifest(TWO), layout.checkpoint(TWO)])


@pytest.mark.parametrize(
    "crime",
    [
        _damage_a_file,
        _lose_a_local_file,
        _damage_a_manifest,
        _commit_without_a_claim,
        _commit_something_else_under_the_same_name,
        _lose_the_pinned_one,
        _lose_the_durable_one,
    ],
)
def test_each_violation_is_found(tmp_path: Path, crime: Callable[[PosixTier, PosixTier], None]) -> None:
    local, remote = PosixTier(tmp_path / "local"), PosixTier(tmp_path / "remote")
    incarnation.claim(local, remote, 0.0)
    for tier in (local, remote):
        commit_checkpoint(tier, ONE)
        commit_checkpoint(tier, TWO, pins=ONE)
    before = tree(tmp_path)
    assert_run_invariants(local, remote, durable=TWO)
    assert tree(tmp_path) == before, "a judge changes nothing"
    crime(local, remote)
    with pytest.raises((AssertionError, CorruptCheckpointError)):
        assert_run_invariants(local, remote, durable=TWO)
