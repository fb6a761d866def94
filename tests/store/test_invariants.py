"""The judge of all histories must be able to convict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from spot_core.errors import CorruptCheckpointError
from spot_core.store import catalog, incarnation, layout
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.testing.checkpoints import commit_checkpoint
from spot_core.testing.invariants import (
    assert_resumes,
    assert_run_invariants,
    assert_swept,
    assert_within_limits,
)
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


def _claim_a_life_here_that_is_not_there(local: PosixTier, remote: PosixTier) -> None:
    local.replace(layout.incarnation(1), b"another")


def _end_at_other_steps(local: PosixTier, remote: PosixTier) -> None:
    for tier, steps in ((local, 20), (remote, 21)):
        catalog.mark_complete(tier, TWO, steps)


def _tear_a_completion_record(local: PosixTier, remote: PosixTier) -> None:
    remote.replace(layout.completion(TWO), b'{"max')


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
        _claim_a_life_here_that_is_not_there,
        _end_at_other_steps,
        _tear_a_completion_record,
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


@pytest.fixture
def both(tmp_path: Path) -> tuple[PosixTier, PosixTier]:
    """Two checkpoints on both tiers."""
    local, remote = PosixTier(tmp_path / "local"), PosixTier(tmp_path / "remote")
    incarnation.claim(local, remote, 0.0)
    for tier in (local, remote):
        for name in (ONE, TWO):
            commit_checkpoint(tier, name)
    return local, remote


def test_damage_that_is_known_is_no_violation(both: tuple[PosixTier, PosixTier]) -> None:
    local, remote = both
    _damage_a_file(local, remote)
    assert_run_invariants(local, remote, durable=TWO, damaged={(remote.url, TWO)})


def test_another_resume_than_expected_is_found_and_nothing_is_changed(
    both: tuple[PosixTier, PosixTier], tmp_path: Path
) -> None:
    local, remote = both
    _lose_a_local_file(local, remote)
    before = tree(tmp_path)
    assert_resumes(local, remote, TWO)
    for wrong in (ONE, None):
        with pytest.raises(AssertionError, match="a resume finds 000001-000000000020"):
            assert_resumes(local, remote, wrong)
    assert tree(tmp_path) == before


def test_what_retention_left_is_found(both: tuple[PosixTier, PosixTier]) -> None:
    assert_within_limits(*both, keep_local=2, keep_remote=2)
    assert_within_limits(*both, keep_local=2, keep_remote=1, keep_every=10)
    for keep_local, keep_remote in ((1, 2), (2, 1)):
        with pytest.raises(AssertionError, match=f"{ONE} should not be in"):
            assert_within_limits(*both, keep_local=keep_local, keep_remote=keep_remote)


@pytest.mark.parametrize("left", [f"{layout.STAGING}/{TWO}/x", f"{layout.CHECKPOINTS}/000001-000000000030/x"])
def test_what_a_crash_left_is_found_once_it_should_have_been_swept(
    both: tuple[PosixTier, PosixTier], left: str
) -> None:
    local, _ = both
    assert_swept(local, before_incarnation=2)
    local.create(left, b"")
    assert_swept(local, before_incarnation=1)
    with pytest.raises(AssertionError, match="is left over"):
        assert_swept(local, before_incarnation=2)


def test_an_end_at_a_checkpoint_that_is_gone_is_found(both: tuple[PosixTier, PosixTier]) -> None:
    local, _ = both
    catalog.mark_complete(local, CheckpointName(1, 30), 30)
    with pytest.raises(AssertionError, match="which is gone"):
        assert_swept(local, before_incarnation=2)
