"""`spot prune`: deletes what is superseded and nothing else, or says why it deletes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from spot_core.agent import lives
from spot_core.environment import STORAGE_OPTIONS
from spot_core.errors import FencedError, TierDeniedError, TierError
from spot_core.report import prune
from spot_core.report.runs import LOST_AFTER_S
from spot_core.store import catalog, incarnation, layout, retention
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.store.tier import Tier, open_tier
from spot_core.testing.faults import MOMENTS, Fault, FaultPlan, FaultyTier, SimulatedCrash
from spot_core.testing.invariants import assert_run_invariants
from tests.report.conftest import Spot, everything_in
from tests.report.stored import BuiltRun, of_newer_format
from tests.servers import S3Server


def _steps(tier: Tier) -> list[int]:
    return [name.step for name in catalog.names(tier)]


def _bytes(run: BuiltRun, name: CheckpointName) -> int:
    return catalog.read_manifest(run.remote, name).total_bytes


def _plan(tier: Tier, *, keep: int = 1) -> prune.PrunePlan:
    return prune.plan(tier, keep=keep, keep_every=None, now=0.0, on_progress=lambda *_: None)


def test_the_newest_two_stay_by_default_and_what_was_freed_is_said(spot: Spot, run: BuiltRun) -> None:
    names = [run.commit(step) for step in (10, 20, 30, 40)]
    freed = sum(_bytes(run, name) for name in names[:2])
    result = spot("prune", run.url)
    assert result.code == 0
    assert catalog.names(run.remote) == [names[3], names[2]]
    assert run.remote.list(layout.CHECKPOINTS) == [str(names[2]), str(names[3])]
    assert f"2 checkpoints deleted, {freed} B freed" in result.out
    assert spot("verify", run.url).code == 0


def test_a_dry_run_deletes_nothing_and_says_what_would_go(spot: Spot, run: BuiltRun) -> None:
    names = [run.commit(step) for step in (10, 20, 30)]
    before = everything_in(run.local.root)
    result = spot("prune", run.url, "--keep", 1, "--dry-run")
    assert result.code == 0
    assert everything_in(run.local.root) == before
    assert f"2 checkpoints would be deleted, {_bytes(run, names[0]) + _bytes(run, names[1])} B freed" in result.out
    assert all(str(name) in result.out for name in names)


def test_milestones_and_what_they_pin_stay(spot: Spot, run: BuiltRun) -> None:
    best = run.commit(40)
    run.commit(90)
    run.commit(105, pins=best)
    for step in (110, 205, 250, 260):
        run.commit(step)
    assert spot("prune", run.url, "--keep", 1, "--keep-every", 100).code == 0
    assert _steps(run.remote) == [260, 205, 105, 40]


def test_the_settings_of_the_run_count_where_they_are_in_the_environment(
    spot: Spot, run: BuiltRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPOT_KEEP_REMOTE", "3")
    monkeypatch.setenv("SPOT_KEEP_EVERY", "20")
    for step in (10, 20, 30, 40, 50, 60):
        run.commit(step)
    assert spot("prune", run.url).code == 0
    assert _steps(run.remote) == [60, 50, 40, 20]


def test_what_the_newest_pins_stays(spot: Spot, run: BuiltRun) -> None:
    best = run.commit(10)
    run.commit(20)
    run.commit(30, pins=best)
    assert spot("prune", run.url, "--keep", 1).code == 0
    assert _steps(run.remote) == [30, 10]


def test_nothing_to_delete_is_no_error(spot: Spot, run: BuiltRun) -> None:
    assert "nothing to delete" in spot("prune", run.url).out
    run.commit(10)
    assert "nothing to delete: all of 1 checkpoint stay" in spot("prune", run.url, "--keep", 1).out


@pytest.mark.parametrize("option", ["--keep", "--keep-every"])
def test_zero_is_a_wrong_call(spot: Spot, run: BuiltRun, option: str) -> None:
    run.commit(10)
    assert spot("prune", run.url, option, 0).code == 2
    assert _steps(run.remote) == [10]


def test_a_folder_of_runs_is_not_pruned(spot: Spot, run: BuiltRun) -> None:
    run.commit(10)
    result = spot("prune", Path(run.url).parent, "--keep", 1)
    assert result.code == 2
    assert "Name one of them" in result.err


def test_other_runs_beside_it_are_not_touched(spot: Spot, run: BuiltRun) -> None:
    for step in (10, 20):
        run.commit(step)
    for name in ("alpaca2", "alpaca.bak", "alp"):
        shutil.copytree(run.local.root, run.local.root.with_name(name))
    before = {name: everything_in(run.local.root.with_name(name)) for name in ("alpaca2", "alpaca.bak", "alp")}
    assert spot("prune", run.url, "--keep", 1).code == 0
    assert _steps(run.remote) == [20]
    assert before == {name: everything_in(run.local.root.with_name(name)) for name in before}


def test_other_runs_in_the_same_bucket_are_not_touched(
    s3_server: S3Server, tmp_path: Path, spot: Spot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an object store a folder is a prefix, and `alpaca` is a prefix of `alpaca2`."""
    monkeypatch.setenv(STORAGE_OPTIONS, json.dumps(s3_server.options))
    bucket = s3_server.new_bucket()
    stored = {}
    for name in ("alpaca", "alpaca2"):
        stored[name] = BuiltRun(tmp_path / name, open_tier(f"s3://{bucket}/{name}", s3_server.options))
        for step in (10, 20, 30):
            stored[name].commit(step)
        stored[name].drain()
    assert spot("prune", stored["alpaca"].url, "--keep", 1).code == 0
    assert _steps(stored["alpaca"].remote) == [30]
    assert stored["alpaca"].remote.list(layout.CHECKPOINTS) == ["000001-000000000030"]
    assert _steps(stored["alpaca2"].remote) == [30, 20, 10]
    assert spot("verify", f"s3://{bucket}").code == 0


def test_while_a_life_is_active_nothing_is_deleted(spot: Spot, run: BuiltRun) -> None:
    run.live(host="gpu-7")
    for step in (10, 20, 30):
        run.commit(step)
    result = spot("prune", run.url, "--keep", 1)
    assert result.code == 2
    assert "is running on gpu-7" in result.err and "Nothing was deleted" in result.err
    assert _steps(run.remote) == [30, 20, 10]


@pytest.mark.parametrize(
    ("outcome", "ended_s_ago"), [(lives.COMPLETED, 0.0), (lives.PREEMPTED, 0.0), (lives.RUNNING, LOST_AFTER_S + 60)]
)
def test_a_life_that_ended_or_vanished_is_in_nobodys_way(
    spot: Spot, run: BuiltRun, outcome: str, ended_s_ago: float
) -> None:
    run.live(outcome, ended_s_ago=ended_s_ago)
    for step in (10, 20, 30):
        run.commit(step, age_s=ended_s_ago)
    assert spot("prune", run.url, "--keep", 1).code == 0
    assert _steps(run.remote) == [30]


def test_a_life_that_begins_meanwhile_stops_it(two_tiers: BuiltRun) -> None:
    for step in (10, 20, 30):
        two_tiers.commit(step)
    two_tiers.drain()
    found = _plan(two_tiers.remote)
    two_tiers.claim()
    with pytest.raises(FencedError, match=r"a new life of this run began.* 0 of 2 checkpoints deleted"):
        prune.execute(two_tiers.remote, found)
    assert _steps(two_tiers.remote) == [30, 20, 10]


def test_the_local_folder_of_a_run_is_not_pruned(spot: Spot, run: BuiltRun) -> None:
    """What it holds may not have reached the remote."""
    for step in (10, 20, 30):
        run.commit(step)
    run.local.create(f"{layout.JOURNAL}/000001-progress", b"")
    result = spot("prune", run.url, "--keep", 1)
    assert result.code == 2
    assert "local folder" in result.err and "spot agent --once" in result.err
    assert _steps(run.remote) == [30, 20, 10]


def test_a_damaged_newest_checkpoint_keeps_the_older_ones(spot: Spot, run: BuiltRun) -> None:
    for step in (10, 20):
        run.commit(step)
    newest = run.commit(30)
    run.file(newest, "optimizer.pt").write_bytes(b"damaged")
    result = spot("prune", run.url, "--keep", 1)
    assert result.code == 1
    assert "Nothing was deleted" in result.err and f"spot repair {run.url}" in result.err
    assert _steps(run.remote) == [30, 20, 10]


@pytest.mark.parametrize("step", [10, 20, 30, 40, 50])
def test_a_damaged_manifest_stays_and_takes_the_place_of_nothing(spot: Spot, run: BuiltRun, step: int) -> None:
    names = {step: run.commit(step) for step in (10, 20, 30, 40, 50)}
    run.local.path(layout.manifest(names[step])).write_bytes(b"{")
    newest_two = [name.step for name in names.values() if name.step != step][-2:]
    result = spot("prune", run.url)
    assert result.code == 0
    assert _steps(run.remote) == sorted({*newest_two, step}, reverse=True)
    told = [line for line in result.out.splitlines() if str(names[step]) in line]
    assert len(told) == 1 and "kept and not counted" in told[0]


@pytest.mark.parametrize("best", [10, 40])
def test_what_a_damaged_manifest_may_refer_to_stays(spot: Spot, run: BuiltRun, best: int) -> None:
    """Until it is mended nobody can read which one that is."""
    names = {step: run.commit(step) for step in (10, 20, 30)}
    names[40] = run.commit(40, pins=names[10] if best == 10 else None)
    damaged = run.commit(50, pins=names[best])
    sound = run.local.read(layout.manifest(damaged))
    run.local.path(layout.manifest(damaged)).write_bytes(b"{")
    assert spot("prune", run.url, "--keep", 1).code == 0
    assert set(_steps(run.remote)) == {50, 40, best}
    run.local.replace(layout.manifest(damaged), sound)
    assert_run_invariants(run.local, run.remote, durable=damaged)


def test_what_a_damaged_milestone_may_refer_to_stays(spot: Spot, run: BuiltRun) -> None:
    best = run.commit(40)
    run.commit(90, pins=best)
    milestone = run.commit(105, pins=best)
    for step in (110, 150, 160):
        run.commit(step)
    run.local.path(layout.manifest(milestone)).write_bytes(b"{")
    assert spot("prune", run.url, "--keep", 1, "--keep-every", 100).code == 0
    assert _steps(run.remote) == [160, 110, 105, 90, 40]


def test_where_no_manifest_can_be_read_nothing_is_deleted(spot: Spot, run: BuiltRun) -> None:
    for step in (10, 20):
        run.local.path(layout.manifest(run.commit(step))).write_bytes(b"{")
    result = spot("prune", run.url, "--keep", 1)
    assert result.code == 0 and "nothing to delete" in result.out and "kept and not counted" in result.out
    assert _steps(run.remote) == [20, 10]


@pytest.mark.parametrize("kind", [TierError, TierDeniedError])
def test_a_deletion_that_fails_says_how_far_it_came(run: BuiltRun, kind: type[TierError]) -> None:
    for step in (10, 20, 30):
        run.commit(step)
    plan = FaultPlan(Fault(operation="delete", first=5, error=lambda: kind("the store said no")))
    tier = FaultyTier(run.remote, plan)
    with pytest.raises(kind, match=r"the store said no\. 1 of 2 checkpoints deleted.*run the same command again"):
        prune.execute(tier, _plan(tier))
    prune.execute(run.remote, _plan(run.remote))
    assert _steps(run.remote) == [30]


def test_a_crash_at_any_operation_leaves_only_what_the_next_sweep_removes(two_tiers: BuiltRun, tmp_path: Path) -> None:
    best = two_tiers.commit(10)
    for step in (20, 30):
        two_tiers.commit(step)
    newest = two_tiers.commit(40, pins=best)
    two_tiers.drain()
    nth = 0
    while True:
        nth += 1
        for when in MOMENTS:
            remote = PosixTier(tmp_path / f"{nth}-{when}")
            shutil.copytree(two_tiers.url, remote.root)
            plan = FaultPlan.crash_at(nth, when)
            tier = FaultyTier(remote, plan)
            try:
                prune.execute(tier, _plan(tier))
                has_crashed = False
            except SimulatedCrash:
                has_crashed = True
            assert has_crashed == bool(plan.fired)
            assert {newest, best} <= set(catalog.names(remote)), plan.fired
            assert_run_invariants(remote, remote, durable=newest)

            prune.execute(remote, _plan(remote))
            assert catalog.names(remote) == [newest, best]
            claimed = incarnation.claim(remote, remote, 0.0)
            retention.sweep_orphans(remote, catalog.names(remote), before_incarnation=claimed)
            assert remote.list(layout.CHECKPOINTS) == [str(best), str(newest)], plan.fired
            assert_run_invariants(remote, remote, durable=newest)
        if not has_crashed:
            assert nth > 10
            return


def test_what_a_newer_release_committed_is_not_pruned(spot: Spot, run: BuiltRun) -> None:
    for step in (1, 2, 3, 4):
        run.commit(step)
    of_newer_format(run.local, CheckpointName(1, 2))
    assert spot("prune", run.url, "--keep", "1").code == 0
    assert catalog.names(run.local) == [CheckpointName(1, 4), CheckpointName(1, 2)]
    of_newer_format(run.local, CheckpointName(1, 4))
    result = spot("prune", run.url, "--keep", "1")
    assert result.code == 2
    assert "was committed by a newer release" in result.err and "Nothing was deleted" in result.err


@pytest.mark.parametrize("is_dry", [True, False])
def test_pruning_says_for_machines_what_it_did(spot: Spot, run: BuiltRun, is_dry: bool) -> None:
    names = [run.commit(step) for step in (1, 2, 3)]
    result = spot("prune", run.url, "--keep", "2", "--json", *(["--dry-run"] if is_dry else []))
    assert result.code == 0
    assert result.json["is_deleted"] is not is_dry
    assert result.json["kept"] == [str(names[2]), str(names[1])]
    assert result.json["unreadable"] == []
    assert [each["name"] for each in result.json["superseded"]] == [str(names[0])]
    assert result.json["size_bytes"] == result.json["superseded"][0]["size_bytes"] > 0
    assert (names[0] in catalog.names(run.local)) is is_dry
