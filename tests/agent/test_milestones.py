"""`keep_every`: milestones stay on the remote for good, are worth an upload, and cost the local disk nothing."""

from __future__ import annotations

from spot_core.store import catalog, layout
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.testing.checkpoints import commit_checkpoint
from spot_core.testing.faults import MOMENTS, FaultPlan, FaultyTier, SimulatedCrash
from spot_core.testing.invariants import assert_run_invariants
from tests.agent.draining import drain_all, make_drain


def at(step: int) -> CheckpointName:
    return CheckpointName(1, step)


def steps(tier: PosixTier) -> list[int]:
    return sorted(name.step for name in catalog.names(tier))


def test_milestones_stay_on_the_remote_and_not_on_the_local_tier(local: PosixTier, remote: PosixTier) -> None:
    drain = make_drain(local, remote, keep_local=1, keep_remote=1, keep_every=100)
    for step in (90, 105, 110, 190, 230, 240, 310):
        commit_checkpoint(local, at(step))
        drain_all(drain)
        assert_run_invariants(local, remote, durable=at(step))
    assert steps(remote) == [105, 230, 310]
    assert steps(local) == [310]


def test_a_milestone_that_waits_in_a_backlog_is_uploaded_after_the_newest(local: PosixTier, remote: PosixTier) -> None:
    for step in (90, 105, 110, 120, 230):
        commit_checkpoint(local, at(step))
    plan = FaultPlan()
    drain = make_drain(local, FaultyTier(remote, plan), keep_local=1, keep_remote=1, keep_every=100)
    first = drain.step(lambda *_: None)
    assert first is not None and first[0] == at(230)
    assert steps(local) == [105, 230], "a milestone stays local until it is durable"
    assert drain_all(drain) == [at(105)]
    assert steps(remote) == [105, 230] and steps(local) == [230]
    assert not [line for line in plan.operations if "upload" in line and (str(at(110)) in line or str(at(90)) in line)]


def test_a_milestone_keeps_what_it_pins_on_the_remote_only(local: PosixTier, remote: PosixTier) -> None:
    drain = make_drain(local, remote, keep_local=1, keep_remote=1, keep_every=100)
    commit_checkpoint(local, at(50))
    drain_all(drain)
    commit_checkpoint(local, at(100), pins=at(50))
    drain_all(drain)
    for step in (110, 120):
        commit_checkpoint(local, at(step))
        drain_all(drain)
    assert steps(remote) == [50, 100, 120]
    assert steps(local) == [120]


def test_a_damaged_local_commit_is_no_milestone(local: PosixTier, remote: PosixTier) -> None:
    manifest = commit_checkpoint(local, at(100))
    local.replace(f"{layout.checkpoint(at(100))}/{manifest.files[0].path}", b"damaged")
    drain = make_drain(local, remote, keep_local=1, keep_remote=1, keep_every=100)
    drain_all(drain)
    for step in (105, 110, 120):
        commit_checkpoint(local, at(step))
        drain_all(drain)
    assert steps(remote) == [105, 120]


def test_the_next_agent_keeps_the_milestones_it_finds(local: PosixTier, remote: PosixTier) -> None:
    for step in (100, 110):
        commit_checkpoint(local, at(step))
        drain_all(make_drain(local, remote, keep_local=1, keep_remote=1, keep_every=100))
    commit_checkpoint(local, at(120))
    drain_all(make_drain(local, remote, keep_local=1, keep_remote=1, keep_every=100))
    assert steps(remote) == [100, 120]


def test_a_crash_at_any_operation_costs_no_milestone(local: PosixTier, remote: PosixTier) -> None:
    for nth in range(1, 1000):
        when = MOMENTS[nth % len(MOMENTS)]
        for tier in (local, remote):
            tier.delete([layout.CHECKPOINTS, layout.MANIFESTS])
        for step in (100, 110, 120):
            commit_checkpoint(local, at(step))
        plan = FaultPlan.crash_at(nth, when)
        try:
            drain_all(make_drain(local, FaultyTier(remote, plan), keep_local=1, keep_remote=1, keep_every=100))
        except SimulatedCrash:
            assert at(100) in {*catalog.names(local), *catalog.names(remote)}, plan.fired
        drain_all(make_drain(local, remote, keep_local=1, keep_remote=1, keep_every=100))
        assert {100, 120} <= set(steps(remote)), plan.fired
        assert_run_invariants(local, remote, durable=at(120))
        if not plan.fired:
            return
    raise AssertionError("it never ended")
