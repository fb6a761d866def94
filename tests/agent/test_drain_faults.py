"""The drain under faults: whatever fails or dies, everything is durable in the end and nothing is gone too early."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from spot_core.agent.drain import Drain
from spot_core.errors import TierError
from spot_core.store import catalog, incarnation, layout, resume, retention
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.testing.checkpoints import commit_checkpoint
from spot_core.testing.faults import MOMENTS, Fault, FaultPlan, FaultyPosixTier, FaultyTier, SimulatedCrash, When
from spot_core.testing.invariants import assert_run_invariants
from tests.agent.draining import FOUR, ONE, THREE, TWO, drain_all, make_drain


def test_a_remote_that_is_down_from_the_start_is_drained_to_when_it_returns(
    local: PosixTier, remote: PosixTier
) -> None:
    plan = FaultPlan(Fault(count=None))
    drain = make_drain(local, FaultyTier(remote, plan))
    commit_checkpoint(local, ONE)
    with pytest.raises(TierError):
        drain_all(drain, patience=5)
    assert catalog.names(remote) == [] and len(plan.fired) > 5
    plan.repair()
    assert drain_all(drain) == [ONE]
    assert_run_invariants(local, remote, durable=ONE)


def test_a_lost_reply_to_the_manifest_does_not_upload_again(local: PosixTier, remote: PosixTier) -> None:
    plan = FaultPlan(Fault(operation="create", path=layout.MANIFESTS, when="after"))
    drain = make_drain(local, FaultyTier(remote, plan))
    manifest = commit_checkpoint(local, ONE)
    with pytest.raises(TierError):
        drain.step(lambda *_: None)
    assert plan.fired == [f"after remote.create {layout.manifest(ONE)}"]
    assert catalog.names(remote) == [ONE]  # committed: from here on its files must not be written
    assert drain_all(drain) == [ONE]
    assert sum("upload" in line for line in plan.operations) == len(manifest.files)
    assert_run_invariants(local, remote, durable=ONE)


@dataclass
class History:
    """Life 1 with one durable checkpoint, and three that wait: the last pins the second and is the end of training.

    Made once and copied for each way it can go on.
    """

    folder: Path
    copies: int = 0

    def __post_init__(self) -> None:
        local, remote = self._tiers("original")
        incarnation.claim(local, remote, 0.0)
        commit_checkpoint(local, ONE)
        drain_all(make_drain(local, remote, keep_local=1, keep_remote=1))
        commit_checkpoint(local, TWO)
        commit_checkpoint(local, THREE)
        commit_checkpoint(local, FOUR, pins=TWO)
        catalog.mark_complete(local, FOUR, 40)

    def _tiers(self, name: str) -> tuple[PosixTier, PosixTier]:
        return PosixTier(self.folder / name / "local"), PosixTier(self.folder / name / "remote")

    def copy(self) -> tuple[PosixTier, PosixTier]:
        self.copies += 1
        shutil.copytree(self.folder / "original", self.folder / str(self.copies))
        return self._tiers(str(self.copies))

    def moments(self) -> list[tuple[int, When]]:
        """Before and after each operation of an undisturbed drain, and in the middle of those that have one."""
        plan = FaultPlan()
        drain_all(faulty_drain(*self.copy(), plan))
        assert sum(".delete " in line for line in plan.operations) >= 6
        assert len(plan.operations) > 30
        has_middle = re.compile(r"\w+\.(upload|record|delete) ")  # the parallel ones come in any order
        return [
            (nth, when)
            for nth, operation in enumerate(plan.operations, start=1)
            for when in MOMENTS
            if when != "midway" or has_middle.match(operation)
        ]


@pytest.fixture
def history(memory_path: Path) -> History:
    return History(memory_path)


def faulty_drain(local: PosixTier, remote: PosixTier, plan: FaultPlan) -> Drain:
    return make_drain(FaultyPosixTier(local.root, plan), FaultyTier(remote, plan), keep_local=1, keep_remote=1)


def drain_into_crash(drain: Drain) -> CheckpointName:
    """The newest checkpoint that was known to be durable when the process died."""
    durable = ONE
    try:
        while (result := drain.step(lambda *_: None)) is not None:
            durable = max(durable, result[0])
    except SimulatedCrash:
        return durable
    raise AssertionError("it did not crash")


def assert_drained(local: PosixTier, remote: PosixTier) -> None:
    assert catalog.names(remote) == [FOUR, TWO]
    assert catalog.completions(remote) == {FOUR: 40}
    assert FOUR in catalog.names(local)
    assert_run_invariants(local, remote, durable=FOUR)


def test_whichever_operation_fails_once_everything_is_drained_in_the_end(history: History) -> None:
    for nth, when in history.moments():
        plan = FaultPlan(Fault(first=nth, when=when))
        local, remote = history.copy()
        drain_all(faulty_drain(local, remote, plan), patience=1)
        assert len(plan.fired) == 1
        assert_drained(local, remote)


def test_however_many_operations_fail_in_a_row_everything_is_drained_in_the_end(history: History) -> None:
    for nth in range(1, history.moments()[-1][0] + 1, 3):
        plan = FaultPlan(Fault(first=nth, count=9, when="after"))
        local, remote = history.copy()
        drain_all(faulty_drain(local, remote, plan), patience=9)
        assert plan.fired
        assert_drained(local, remote)


def test_a_crash_at_any_operation_loses_nothing_and_the_next_life_finishes(history: History) -> None:
    for nth, when in history.moments():
        plan = FaultPlan.crash_at(nth, when)
        local, remote = history.copy()
        durable = drain_into_crash(faulty_drain(local, remote, plan))
        assert len(plan.fired) == 1

        assert_run_invariants(local, remote, durable=durable)
        assert FOUR in catalog.names(local), plan.fired

        number = incarnation.claim(local, remote, 0.0)
        for tier in (local, remote):
            retention.sweep_orphans(tier, catalog.names(tier), before_incarnation=number)
            committed = {str(name) for name in catalog.names(tier)}
            assert set(tier.list(layout.CHECKPOINTS)) == committed, plan.fired
        assert_run_invariants(local, remote, durable=durable)

        drain_all(Drain(local, remote, incarnation=number, keep_local=1, keep_remote=1))
        assert_run_invariants(local, remote, durable=FOUR)
        assert {FOUR, TWO} <= set(catalog.names(remote)), plan.fired
        assert catalog.completions(remote) == {FOUR: 40}


def test_a_new_instance_restores_what_was_durable_after_a_crash_at_any_operation(
    history: History, memory_path: Path
) -> None:
    for nth in range(1, history.moments()[-1][0] + 1):
        plan = FaultPlan.crash_at(nth, "midway")
        local, remote = history.copy()
        with pytest.raises(SimulatedCrash):
            drain_all(faulty_drain(local, remote, plan))
        newest = catalog.names(remote)[0]
        assert newest >= ONE
        restored = resume.newest_valid(PosixTier(memory_path / f"new-{nth}"), remote, lambda *_: None)
        assert restored is not None and restored.manifest.name == newest
