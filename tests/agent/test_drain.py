"""The drain: from the local to the remote tier, newest first, whatever fails, and nothing deleted too early."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from spot_core.errors import CommitConflictError, CorruptCheckpointError, TierError
from spot_core.report import places, repair
from spot_core.store import catalog, incarnation, layout, retention
from spot_core.store import identity as identities
from spot_core.store.identity import RunIdentity
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import FileRecord
from spot_core.store.posix import PosixTier
from spot_core.store.remote import FsspecTier
from spot_core.store.tier import OnBytes, Tier
from spot_core.testing.checkpoints import commit_checkpoint
from spot_core.testing.faults import Fault, FaultPlan, FaultyPosixTier, FaultyTier
from spot_core.testing.invariants import assert_run_invariants
from tests.agent.draining import FOUR, ONE, THREE, TWO, drain_all, make_drain
from tests.servers import S3Server
from tests.trees import tree

# -- what is drained, in which order ---------------------------------------------------------------------------


def test_nothing_to_drain_is_no_work(local: PosixTier, remote: PosixTier) -> None:
    assert drain_all(make_drain(local, remote)) == []


def test_the_newest_is_drained_first(local: PosixTier, remote: PosixTier) -> None:
    for name in (ONE, TWO, THREE):
        commit_checkpoint(local, name)
    assert drain_all(make_drain(local, remote, keep_local=3, keep_remote=3)) == [THREE, TWO, ONE]
    assert catalog.names(remote) == [THREE, TWO, ONE]
    assert_run_invariants(local, remote, durable=THREE)


def test_what_a_newer_one_made_worthless_is_not_uploaded(local: PosixTier, remote: PosixTier) -> None:
    for name in (ONE, TWO, THREE, FOUR):
        commit_checkpoint(local, name)
    plan = FaultPlan()
    assert drain_all(make_drain(local, FaultyTier(remote, plan), keep_remote=2)) == [FOUR, THREE]
    uploads = [line for line in plan.operations if "upload" in line]
    assert uploads and not [line for line in uploads if str(ONE) in line or str(TWO) in line]
    assert catalog.names(local) == catalog.names(remote) == [FOUR, THREE]


def test_what_is_on_the_remote_already_is_not_uploaded_again(local: PosixTier, remote: PosixTier) -> None:
    commit_checkpoint(local, ONE)
    drain_all(make_drain(local, remote))
    plan = FaultPlan()
    assert drain_all(make_drain(local, FaultyTier(remote, plan))) == []
    assert not [line for line in plan.operations if "upload" in line or "create" in line or "delete" in line]


def test_a_commit_made_during_the_drain_comes_next(local: PosixTier, remote: PosixTier) -> None:
    commit_checkpoint(local, ONE)
    commit_checkpoint(local, TWO)
    drain = make_drain(local, remote)
    assert drain.step(lambda *_: None) is not None
    commit_checkpoint(local, THREE)
    assert drain.pending() == [THREE]
    assert drain_all(drain) == [THREE]


def test_progress_starts_at_nothing_and_ends_at_all_of_it(local: PosixTier, remote: PosixTier) -> None:
    manifest = commit_checkpoint(local, ONE)
    seen: list[tuple[CheckpointName, int, int]] = []
    make_drain(local, remote).step(lambda *progress: seen.append(progress))
    assert seen[0] == (ONE, 0, manifest.total_bytes)
    assert max(done for _, done, _ in seen) == manifest.total_bytes


def test_what_is_durable_is_told_before_what_it_supersedes_is_deleted(local: PosixTier, remote: PosixTier) -> None:
    plan = FaultPlan()
    drain = make_drain(local, FaultyTier(remote, plan), keep_remote=1)
    told: list[tuple[CheckpointName, bool, bool]] = []

    def on_durable(name: CheckpointName, seconds: float) -> None:
        is_deleting = any(line.startswith(f"remote.delete {layout.MANIFESTS}") for line in plan.operations)
        told.append((name, catalog.has(remote, name), is_deleting))

    for name in (ONE, TWO):
        commit_checkpoint(local, name)
        assert drain.step(lambda *_: None, on_durable) is not None
    assert told == [(ONE, True, False), (TWO, True, False)]
    assert catalog.names(remote) == [TWO]


def test_the_end_of_training_is_drained_with_its_checkpoint(local: PosixTier, remote: PosixTier) -> None:
    drain = make_drain(local, remote)
    commit_checkpoint(local, ONE)
    drain_all(drain)
    assert catalog.completions(remote) == {}
    commit_checkpoint(local, TWO)
    catalog.mark_complete(local, TWO, 20)
    drain_all(drain)
    assert catalog.completions(remote) == {TWO: 20}
    assert_run_invariants(local, remote, durable=TWO)


def test_the_end_of_training_is_not_told_before_its_checkpoint_is_durable(local: PosixTier, remote: PosixTier) -> None:
    commit_checkpoint(local, ONE)
    catalog.mark_complete(local, ONE, 10)
    plan = FaultPlan()
    drain_all(make_drain(local, FaultyTier(remote, plan)))
    created = [line for line in plan.operations if "create" in line]
    assert created == [f"remote.create {layout.manifest(ONE)}", f"remote.create {layout.completion(ONE)}"]


# -- what is pinned --------------------------------------------------------------------------------------------


def test_the_pinned_one_is_durable_before_the_one_that_pins_it(local: PosixTier, remote: PosixTier) -> None:
    commit_checkpoint(local, ONE)
    commit_checkpoint(local, TWO)
    commit_checkpoint(local, THREE, pins=ONE)
    assert drain_all(make_drain(local, remote, keep_remote=1)) == [ONE, THREE]
    assert catalog.names(remote) == [THREE, ONE]
    assert_run_invariants(local, remote, durable=THREE)


def test_the_pinned_one_survives_while_it_is_pinned(local: PosixTier, remote: PosixTier) -> None:
    drain = make_drain(local, remote, keep_local=1, keep_remote=1)
    commit_checkpoint(local, ONE)
    drain_all(drain)
    for step in (50, 60, 70):
        commit_checkpoint(local, CheckpointName(1, step), pins=ONE)
        drain_all(drain)
        assert catalog.names(local) == catalog.names(remote) == [CheckpointName(1, step), ONE]
        assert_run_invariants(local, remote, durable=CheckpointName(1, step))
    commit_checkpoint(local, CheckpointName(1, 80), pins=CheckpointName(1, 70))
    drain_all(drain)
    assert catalog.names(local) == catalog.names(remote) == [CheckpointName(1, 80), CheckpointName(1, 70)]


def test_what_a_commit_that_still_waits_pins_is_not_deleted_meanwhile(local: PosixTier, remote: PosixTier) -> None:
    drain = make_drain(local, remote, keep_local=1, keep_remote=1)
    commit_checkpoint(local, ONE)
    drain_all(drain)
    commit_checkpoint(local, TWO)

    def commit_another(name: CheckpointName, done: int, total: int) -> None:
        if done == total and THREE not in catalog.names(local):
            commit_checkpoint(local, THREE, pins=ONE)

    drain.step(commit_another)
    assert ONE in catalog.names(local) and ONE in catalog.names(remote)
    assert drain_all(drain) == [THREE]
    assert_run_invariants(local, remote, durable=THREE)


def test_every_commit_that_still_waits_keeps_what_it_pins(local: PosixTier, remote: PosixTier) -> None:
    """The newest of them may turn out to be damaged; then the one before it is drained after all."""
    drain = make_drain(local, remote, keep_local=1, keep_remote=1)
    commit_checkpoint(local, ONE)
    drain_all(drain)
    commit_checkpoint(local, TWO)

    def commit_others(name: CheckpointName, done: int, total: int) -> None:
        if done == total and FOUR not in catalog.names(local):
            commit_checkpoint(local, THREE, pins=ONE)
            commit_checkpoint(local, FOUR)

    drain.step(commit_others)
    assert ONE in catalog.names(local)
    local.delete([layout.checkpoint(FOUR)])
    assert drain_all(drain) == [THREE]
    assert ONE in catalog.names(remote)
    assert remote.list(layout.CHECKPOINTS) == [str(ONE), str(THREE)]


def test_a_backlog_keeps_what_it_pins(local: PosixTier, remote: PosixTier) -> None:
    drain = make_drain(local, remote, keep_local=1, keep_remote=2)
    commit_checkpoint(local, ONE)
    drain_all(drain)
    commit_checkpoint(local, TWO)
    drain_all(drain)
    commit_checkpoint(local, THREE, pins=ONE)
    commit_checkpoint(local, FOUR)
    uploaded: set[CheckpointName] = set()
    while drain.step(lambda name, *_: uploaded.add(name)) is not None:
        assert ONE in catalog.names(remote)
    assert catalog.names(remote) == [FOUR, THREE, ONE]
    assert uploaded == {THREE, FOUR}, "what was pinned had to be uploaded again"


def test_what_an_older_kept_one_pins_stays_on_the_remote_while_newer_ones_wait(
    local: PosixTier, remote: PosixTier
) -> None:
    """Were the newest durable one all that is left of the run, its best model would be gone."""
    drain = make_drain(local, remote, keep_local=1, keep_remote=2)
    commit_checkpoint(local, ONE)
    drain_all(drain)
    commit_checkpoint(local, TWO, pins=ONE)
    drain_all(drain)
    for step in (50, 60):
        commit_checkpoint(local, CheckpointName(1, step))
    commit_checkpoint(local, CheckpointName(1, 70), pins=CheckpointName(1, 50))
    while (result := drain.step(lambda *_: None)) is not None:
        assert_run_invariants(local, remote, durable=result[0])
        newest_two = catalog.names(remote)[:2]
        for name in newest_two:
            pin = catalog.read_manifest(remote, name).pins
            assert pin is None or pin in catalog.names(remote), f"{name} lost {pin}"


def test_what_a_waiting_milestone_pins_stays_here_until_both_are_there(local: PosixTier, remote: PosixTier) -> None:
    """Somebody who prunes the remote by hand meanwhile cannot know what a disk elsewhere refers to."""
    keeps = {"keep_local": 1, "keep_remote": 1, "keep_every": TWO.step}
    drain = make_drain(local, remote, **keeps)
    commit_checkpoint(local, ONE)
    drain_all(drain)
    commit_checkpoint(local, TWO, pins=ONE)
    commit_checkpoint(local, FOUR)
    assert drain.step(lambda *_: None) is not None
    assert catalog.names(local) == [FOUR, TWO, ONE]
    retention.delete_checkpoints(remote, [ONE])
    drain_all(make_drain(local, remote, **keeps))
    assert catalog.names(remote) == [FOUR, TWO, ONE]


# -- what may be deleted ---------------------------------------------------------------------------------------


def test_nothing_is_deleted_before_a_newer_one_is_durable(local: PosixTier, remote: PosixTier) -> None:
    plan = FaultPlan()
    drain = make_drain(FaultyPosixTier(local.root, plan), FaultyTier(remote, plan), keep_local=1, keep_remote=1)
    for name in (ONE, TWO, THREE):
        commit_checkpoint(local, name)
        drain_all(drain)
    deletions = [index for index, line in enumerate(plan.operations) if ".delete " in line]
    assert deletions
    for index in deletions:
        deleted = next(name for name in (ONE, TWO, THREE) if str(name) in plan.operations[index])
        newer = [name for name in (ONE, TWO, THREE) if name > deleted]
        assert any(f"remote.create {layout.manifest(name)}" in plan.operations[:index] for name in newer)


def test_while_the_remote_fails_nothing_is_deleted_anywhere(local: PosixTier, remote: PosixTier) -> None:
    commit_checkpoint(local, ONE)
    drain_all(make_drain(local, remote, keep_local=1, keep_remote=1))
    plan = FaultPlan(Fault(operation="upload", count=None))
    drain = make_drain(local, FaultyTier(remote, plan), keep_local=1, keep_remote=1)
    for name in (TWO, THREE, FOUR):
        commit_checkpoint(local, name)
        with pytest.raises(TierError):
            drain_all(drain, patience=3)
    assert catalog.names(local) == [FOUR, THREE, TWO, ONE]
    assert catalog.names(remote) == [ONE]
    assert_run_invariants(local, remote, durable=ONE)


def test_a_damaged_local_checkpoint_is_not_uploaded_and_is_told_once(
    local: PosixTier, remote: PosixTier, caplog: pytest.LogCaptureFixture
) -> None:
    commit_checkpoint(local, ONE)
    manifest = commit_checkpoint(local, TWO)
    local.replace(f"{layout.checkpoint(TWO)}/{manifest.files[0].path}", b"damaged")
    drain = make_drain(local, remote, keep_local=1, keep_remote=1)
    assert drain_all(drain) == [ONE]
    assert drain_all(drain) == []
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1 and str(TWO) in errors[0]
    assert catalog.names(remote) == [ONE]
    assert ONE in catalog.names(local)
    commit_checkpoint(local, THREE)
    assert drain_all(drain) == [THREE]
    assert catalog.names(remote) == catalog.names(local) == [THREE]


def test_bytes_that_change_on_the_way_are_not_committed(local: PosixTier, remote: PosixTier) -> None:
    class Corrupting(PosixTier):
        is_broken = True

        def upload(self, source: Path, path: str, on_bytes: OnBytes) -> FileRecord | None:
            attested = super().upload(source, path, on_bytes)
            if self.is_broken and path.endswith("model.bin"):
                data = bytearray(self.read(path))
                data[5] ^= 1
                self.replace(path, bytes(data))
            return attested

    broken = Corrupting(remote.root)
    commit_checkpoint(local, ONE)
    drain = make_drain(local, broken)
    with pytest.raises(CorruptCheckpointError):
        drain.step(lambda *_: None)
    assert catalog.names(remote) == []
    broken.is_broken = False
    assert drain_all(drain) == [ONE]
    assert_run_invariants(local, remote, durable=ONE)


def test_a_name_that_another_writer_committed_is_left_as_it_is(local: PosixTier, remote: PosixTier) -> None:
    drain = make_drain(local, remote)
    assert drain_all(drain) == []
    commit_checkpoint(remote, ONE, files={"checkpoint-10/model.bin": b"another's"})
    before = tree(remote.root)
    commit_checkpoint(local, ONE)
    with pytest.raises(CommitConflictError, match=r"exists in .* with other content$"):
        drain.step(lambda *_: None)
    assert drain_all(drain) == []
    assert tree(remote.root) == before


def _damage(tier: PosixTier) -> None:
    tier.replace(layout.manifest(ONE), tier.read(layout.manifest(ONE))[:300])


def _link(tier: PosixTier) -> None:
    manifest = tier.path(layout.manifest(ONE))
    manifest.symlink_to(manifest.rename(tier.root / "elsewhere.json"))


@pytest.mark.parametrize("damage", [_damage, _link])
def test_a_damaged_manifest_on_the_remote_points_to_what_mends_it(
    local: PosixTier, remote: PosixTier, damage: Callable[[PosixTier], None]
) -> None:
    identities.create_run(local, remote, RunIdentity("testing", {}), 1.0)
    commit_checkpoint(local, ONE)
    drain_all(make_drain(local, remote))
    damage(remote)
    wanted = re.escape(f"spot repair {remote.url} --from {local.url}")
    with pytest.raises(CommitConflictError, match=f"other content: .*The local copy is whole and stays.*{wanted}$"):
        drain_all(make_drain(local, remote))
    remote_run, local_run = (places.open_run(tier.url, {}) for tier in (remote, local))
    mended = repair.repair(remote_run, local_run, now=1.0, on_progress=lambda *_: None)
    assert [each.error for each in mended.damaged] == [None]
    assert drain_all(make_drain(local, remote)) == []
    assert_run_invariants(local, remote, durable=ONE)


def _fill_with_other_runs(tier: Tier, names: tuple[str, ...]) -> None:
    for run in names:
        for path in (layout.checkpoint(ONE) + "/model.bin", layout.manifest(ONE), f"staging/{ONE}/x", "run.json"):
            tier.create(f"{run}/{path}", run.encode())


OTHER_RUNS = ("run2", "run-2", "ru", "run.bak")


def test_other_runs_in_the_same_folders_are_not_touched(tmp_path: Path) -> None:
    for root in ("local", "remote"):
        _fill_with_other_runs(PosixTier(tmp_path / root), OTHER_RUNS)
    others = [tmp_path / root / run for root in ("local", "remote") for run in OTHER_RUNS]
    before = [tree(folder) for folder in others]
    _live_a_full_life(PosixTier(tmp_path / "local" / "run"), PosixTier(tmp_path / "remote" / "run"))
    assert all(before)
    assert [tree(folder) for folder in others] == before


def test_other_runs_in_the_same_bucket_are_not_touched(s3_server: S3Server, tmp_path: Path) -> None:
    """On an object store a folder is a prefix, and `run` is a prefix of `run2`."""
    bucket = f"s3://{s3_server.new_bucket()}"
    whole = FsspecTier(f"{bucket}/team", s3_server.options)
    _fill_with_other_runs(whole, OTHER_RUNS)
    before = {path: whole._fs.cat_file(path) for path in whole._fs.find(whole._root)}
    _live_a_full_life(PosixTier(tmp_path / "local" / "run"), FsspecTier(f"{bucket}/team/run", s3_server.options))
    after = {path: whole._fs.cat_file(path) for path in whole._fs.find(whole._root)}
    assert len(before) == 4 * len(OTHER_RUNS)
    assert {path: after.get(path) for path in before} == before
    assert len(after) > len(before)


def _live_a_full_life(local: PosixTier, remote: Tier) -> None:
    """Commit, drain, prune; leave orphans; sweep them in a second life."""
    assert incarnation.claim(local, remote, 0.0) == 1
    drain = make_drain(local, remote, keep_local=1, keep_remote=1)
    for name in (ONE, TWO, THREE):
        commit_checkpoint(local, name)
        drain_all(drain)
    for tier in (local, remote):
        tier.create(f"{layout.checkpoint(FOUR)}/orphan", b"without a manifest")
    number = incarnation.claim(local, remote, 0.0)
    for tier in (local, remote):
        retention.sweep_orphans(tier, catalog.names(tier), before_incarnation=number)
        assert tier.list(layout.CHECKPOINTS) == [str(THREE)]
    assert_run_invariants(local, remote, durable=THREE)
