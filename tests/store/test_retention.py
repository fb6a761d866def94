"""What may be deleted: nothing before a newer checkpoint is durable, and never another run's files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spot_core.store import catalog, layout, resume, retention
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.testing.checkpoints import commit_checkpoint
from spot_core.testing.faults import FaultPlan, FaultyTier, SimulatedCrash

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


def test_the_first_at_or_after_each_multiple_is_a_milestone() -> None:
    names = [CheckpointName(1, step) for step in (5, 99, 100, 101, 350, 399, 400, 450)]
    assert sorted(name.step for name in retention.milestones(names, every=100)) == [100, 350, 400]
    assert {name.step for name in retention.milestones(names, every=1)} == {name.step for name in names}
    assert retention.milestones(names, every=1000) == set()
    assert retention.milestones(names, every=None) == set()


def test_a_life_that_goes_on_beyond_a_milestone_adds_none() -> None:
    names = [CheckpointName(1, 105), CheckpointName(2, 140), CheckpointName(3, 205)]
    assert retention.milestones(names, every=100) == {CheckpointName(1, 105), CheckpointName(3, 205)}


def test_a_life_that_trained_again_from_before_a_milestone_adds_its_own() -> None:
    names = [CheckpointName(1, 105), CheckpointName(2, 102), CheckpointName(2, 104), CheckpointName(3, 102)]
    again = {CheckpointName(1, 105), CheckpointName(2, 102), CheckpointName(3, 102)}
    assert retention.milestones(names, every=100) == again


@given(names=st.sets(NAMES), later=st.sets(NAMES), every=st.integers(1, 4), data=st.data())
def test_a_milestone_stays_one_whatever_is_deleted_or_comes_in_later_lives(
    names: set[CheckpointName], later: set[CheckpointName], every: int, data: st.DataObject
) -> None:
    found = retention.milestones(names, every=every)
    assert found <= names
    assert {name.step // every for name in found} == {name.step // every for name in names} - {0}
    others = sorted(names - found)
    left = names - data.draw(st.sets(st.sampled_from(others)) if others else st.just(set()))
    assert retention.milestones(left, every=every) == found
    newest = max((name.incarnation for name in names), default=0)
    added = {CheckpointName(newest + name.incarnation, name.step) for name in later}
    assert found <= retention.milestones(names | added, every=every)


def test_what_refers_to_another_goes_before_that_one(tier: PosixTier) -> None:
    """Found by the histories: a prune that was interrupted left a checkpoint without its best model."""
    commit_checkpoint(tier, ONE)
    commit_checkpoint(tier, TWO, pins=ONE)
    plan = FaultPlan.crash_at(2, "after")
    with pytest.raises(SimulatedCrash):
        retention.delete_checkpoints(FaultyTier(tier, plan), [ONE, TWO])
    assert catalog.names(tier) == [ONE]


def test_the_manifest_goes_before_the_files(tier: PosixTier) -> None:
    for name in ALL:
        commit_checkpoint(tier, name)
    catalog.mark_complete(tier, ONE, 1)
    plan = FaultPlan()
    retention.delete_checkpoints(FaultyTier(tier, plan), [ONE, TWO])
    assert plan.operations[:2] == [f"remote.delete {layout.manifest(TWO)}", f"remote.delete {layout.checkpoint(TWO)}"]
    assert catalog.names(tier) == [FOUR, THREE]
    assert tier.list(layout.CHECKPOINTS) == [str(THREE), str(FOUR)]
    assert catalog.completions(tier) == {}


def test_a_sweep_takes_what_crashes_of_earlier_lives_left_and_nothing_else(tier: PosixTier) -> None:
    commit_checkpoint(tier, ONE)
    for name in (TWO, CheckpointName(2, 5), CheckpointName(3, 6)):
        commit_checkpoint(tier, name)
        tier.delete([layout.manifest(name)])
        tier.create(f"{layout.STAGING}/{name}/file", b"half")
    for path in ("checkpoints/notes/readme", "staging/resume-77/model.bin", "else/000001-000000000001/x"):
        tier.create(path, b"not ours")
    swept = retention.sweep_orphans(tier, catalog.names(tier), before_incarnation=2)
    assert swept == 2
    alive = [str(CheckpointName(2, 5)), str(CheckpointName(3, 6))]
    assert tier.list(layout.CHECKPOINTS) == [str(ONE), *alive, "notes"]
    assert tier.list(layout.STAGING) == [*alive, "resume-77"]
    assert tier.list("else/000001-000000000001") == ["x"]
    resume.verify(tier, catalog.read_manifest(tier, ONE))
