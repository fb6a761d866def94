"""What may be deleted: nothing before a newer checkpoint is durable, and never another run's files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spot_core.store import layout, resume, retention
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.testing.checkpoints import commit_checkpoint
from spot_core.testing.faults import FaultPlan, FaultyTier

ONE, TWO, THREE, FOUR = (CheckpointName(1, step) for step in (1, 2, 3, 4))
ALL = [ONE, TWO, THREE, FOUR]


@pytest.fixture
def tier(tmp_path: Path) -> PosixTier:
    return PosixTier(tmp_path / "tier")


def test_nothing_may_go_before_anything_is_durable() -> None:
    assert retention.superseded(ALL, keep=1, durable=[]) == []


def test_what_is_older_than_the_newest_durable_one_and_beyond_the_limit_may_go_oldest_first() -> None:
    assert retention.superseded(ALL, keep=1, durable=[FOUR]) == [ONE, TWO, THREE]
    assert retention.superseded(ALL, keep=2, durable=[FOUR]) == [ONE, TWO]
    assert retention.superseded(ALL, keep=9, durable=[FOUR]) == []


def test_what_is_newer_than_the_newest_durable_one_stays() -> None:
    assert retention.superseded(ALL, keep=1, durable=[TWO]) == [ONE]
    assert retention.superseded(ALL, keep=1, durable=[ONE]) == []


def test_what_is_pinned_stays() -> None:
    assert retention.superseded(ALL, keep=1, durable=[FOUR], pinned=[ONE, THREE]) == [TWO]


def test_an_older_life_is_older_whatever_its_step() -> None:
    long_ago = CheckpointName(1, 9000)
    assert retention.superseded([long_ago, CheckpointName(2, 1)], keep=1, durable=[CheckpointName(2, 1)]) == [long_ago]


NAMES = st.builds(CheckpointName, st.integers(1, 4), st.integers(0, 6))


@given(present=st.sets(NAMES), durable=st.sets(NAMES), pinned=st.sets(NAMES), keep=st.integers(1, 4))
def test_the_newest_the_durable_and_the_pinned_always_stay(
    present: set[CheckpointName], durable: set[CheckpointName], pinned: set[CheckpointName], keep: int
) -> None:
    doomed = retention.superseded(present, keep=keep, durable=durable, pinned=pinned)
    assert doomed == sorted(set(doomed) & present)
    left = present - set(doomed)
    assert set(sorted(present)[-keep:]) <= left
    assert pinned & present <= left
    newest = max(durable, default=None)
    assert all(newest is not None and name < newest for name in doomed)


def test_the_manifest_goes_before_the_files(tier: PosixTier) -> None:
    for name in ALL:
        commit_checkpoint(tier, name)
    resume.mark_complete(tier, ONE, 1)
    plan = FaultPlan()
    retention.delete_checkpoints(FaultyTier(tier, plan), [ONE, TWO])
    assert plan.operations[:2] == [f"remote.delete {layout.manifest(ONE)}", f"remote.delete {layout.checkpoint(ONE)}"]
    assert resume.names(tier) == [FOUR, THREE]
    assert tier.list(layout.CHECKPOINTS) == [str(THREE), str(FOUR)]
    assert resume.completions(tier) == {}


def test_a_sweep_takes_what_crashes_of_earlier_lives_left_and_nothing_else(tier: PosixTier) -> None:
    commit_checkpoint(tier, ONE)
    for name in (TWO, CheckpointName(2, 5), CheckpointName(3, 6)):
        commit_checkpoint(tier, name)
        tier.delete([layout.manifest(name)])
        tier.create(f"{layout.STAGING}/{name}/file", b"half")
    for path in ("checkpoints/notes/readme", "staging/resume-77/model.bin", "else/000001-000000000001/x"):
        tier.create(path, b"not ours")
    swept = retention.sweep_orphans(tier, resume.names(tier), before_incarnation=2)
    assert swept == 2
    alive = [str(CheckpointName(2, 5)), str(CheckpointName(3, 6))]
    assert tier.list(layout.CHECKPOINTS) == [str(ONE), *alive, "notes"]
    assert tier.list(layout.STAGING) == [*alive, "resume-77"]
    assert tier.list("else/000001-000000000001") == ["x"]
    resume.verify(tier, resume.read_manifest(tier, ONE))
