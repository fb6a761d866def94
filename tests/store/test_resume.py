"""Choosing what to resume from: the newest valid checkpoint, and never a silent fresh start."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from spot_core.errors import CorruptCheckpointError, TierDeniedError, TierError
from spot_core.store import catalog, incarnation, layout, resume, retention
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.posix import PosixTier
from spot_core.store.remote import FsspecTier
from spot_core.store.resume import Restored
from spot_core.store.tier import Tier
from spot_core.testing.checkpoints import commit_checkpoint, content_of
from spot_core.testing.faults import MOMENTS, Fault, FaultPlan, FaultyPosixTier, FaultyTier, SimulatedCrash, When
from spot_core.testing.invariants import assert_run_invariants
from tests.servers import RefusingServer, S3Server, free_port, s3_options
from tests.trees import tree

OLD, NEW = CheckpointName(1, 10), CheckpointName(1, 20)


def restore(local: PosixTier, remote: Tier) -> Restored | None:
    return resume.newest_valid(local, remote, lambda *_: None)


def assert_restored(local: PosixTier, remote: Tier, name: CheckpointName, source: str) -> None:
    """`name` is chosen, its bytes come from `source`, and it ends up verified on the local tier."""
    restored = restore(local, remote)
    assert restored is not None
    assert (restored.manifest.name, restored.source) == (name, source)
    for path, content in content_of(name).items():
        assert local.read(f"{layout.checkpoint(name)}/{path}") == content
    assert catalog.read_manifest(local, name) == restored.manifest
    assert local.list(layout.STAGING) == []


# -- which one -------------------------------------------------------------------------------------------------


def test_empty_tiers_mean_a_fresh_start(local: PosixTier, remote: PosixTier) -> None:
    assert restore(local, remote) is None


def test_the_newest_of_both_tiers_wins(local: PosixTier, remote: PosixTier) -> None:
    commit_checkpoint(local, OLD)
    commit_checkpoint(remote, NEW)
    assert_restored(local, remote, NEW, "remote")


def test_what_is_on_both_tiers_is_taken_from_the_local_one(local: PosixTier, remote: PosixTier) -> None:
    for tier in (local, remote):
        commit_checkpoint(tier, NEW)
    assert_restored(local, remote, NEW, "local")


def test_a_higher_incarnation_beats_a_higher_step(local: PosixTier, remote: PosixTier) -> None:
    """The newer life resumed from below the step that the older one went on to reach before it was fenced."""
    for name in (CheckpointName(2, 5), CheckpointName(1, 9000)):
        commit_checkpoint(local, name)
    assert catalog.names(local) == [CheckpointName(2, 5), CheckpointName(1, 9000)]
    commit_checkpoint(remote, CheckpointName(2, 10))
    assert_restored(local, remote, CheckpointName(2, 10), "remote")


def test_what_was_restored_is_local_the_next_time(local: PosixTier, remote: PosixTier) -> None:
    commit_checkpoint(remote, NEW)
    assert_restored(local, remote, NEW, "remote")
    assert_restored(local, remote, NEW, "local")


def test_files_without_a_manifest_are_no_checkpoint(local: PosixTier, remote: PosixTier) -> None:
    for tier in (local, remote):
        commit_checkpoint(tier, OLD)
        commit_checkpoint(tier, NEW)
        tier.delete([layout.manifest(NEW)])
    assert_restored(local, remote, OLD, "local")
    for tier in (local, remote):
        tier.delete([layout.manifest(OLD)])
    assert restore(local, remote) is None


def test_orphaned_local_files_are_not_in_the_way_of_a_download(local: PosixTier, remote: PosixTier) -> None:
    commit_checkpoint(local, NEW, files={"checkpoint-20/other.bin": b"of a commit that never was"})
    local.delete([layout.manifest(NEW)])
    commit_checkpoint(remote, NEW)
    assert_restored(local, remote, NEW, "remote")
    assert local.list(f"{layout.checkpoint(NEW)}/checkpoint-20") == ["empty", "model.bin", "state"]


def test_foreign_entries_beside_the_manifests_are_ignored(local: PosixTier, remote: PosixTier) -> None:
    for entry in ("readme.txt", str(NEW), f"{NEW}.json.bak", f"{NEW}.complete.json"):
        remote.create(f"{layout.MANIFESTS}/{entry}", b"something")
    assert restore(local, remote) is None
    commit_checkpoint(remote, OLD)
    assert_restored(local, remote, OLD, "remote")


def test_s3_restores_what_was_drained_there(s3_server: S3Server, local: PosixTier, tmp_path: Path) -> None:
    remote = FsspecTier(f"s3://{s3_server.new_bucket()}/run", s3_server.options)
    source = PosixTier(tmp_path / "another-instance")
    manifest = commit_checkpoint(source, NEW)
    for file in manifest.files:
        path = f"{layout.checkpoint(NEW)}/{file.path}"
        remote.upload(source.path(path), path, lambda _: None)
    assert restore(local, remote) is None
    remote.create(layout.manifest(NEW), manifest.to_json())
    assert_restored(local, remote, NEW, "remote")


# -- damage ----------------------------------------------------------------------------------------------------


def _flip_a_bit(tier: PosixTier, manifest: Manifest) -> None:
    path = tier.path(f"{layout.checkpoint(manifest.name)}/{manifest.files[0].path}")
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


def _truncate_a_file(tier: PosixTier, manifest: Manifest) -> None:
    path = tier.path(f"{layout.checkpoint(manifest.name)}/{manifest.files[0].path}")
    path.write_bytes(path.read_bytes()[:-1])


def _lengthen_a_file(tier: PosixTier, manifest: Manifest) -> None:
    with open(tier.path(f"{layout.checkpoint(manifest.name)}/{manifest.files[-1].path}"), "ab") as file:
        file.write(b"\0")


def _lose_a_file(tier: PosixTier, manifest: Manifest) -> None:
    tier.delete([f"{layout.checkpoint(manifest.name)}/{manifest.files[1].path}"])


def _lose_all_files(tier: PosixTier, manifest: Manifest) -> None:
    tier.delete([layout.checkpoint(manifest.name)])


def _empty_the_manifest(tier: PosixTier, manifest: Manifest) -> None:
    tier.replace(layout.manifest(manifest.name), b"")


def _tear_the_manifest(tier: PosixTier, manifest: Manifest) -> None:
    tier.replace(layout.manifest(manifest.name), manifest.to_json()[:300])


def _take_anothers_manifest(tier: PosixTier, manifest: Manifest) -> None:
    tier.replace(layout.manifest(manifest.name), manifest.to_json().replace(str(manifest.name).encode(), b"x" * 19))


DAMAGES: list[Callable[[PosixTier, Manifest], None]] = [
    _flip_a_bit,
    _truncate_a_file,
    _lengthen_a_file,
    _lose_a_file,
    _lose_all_files,
    _empty_the_manifest,
    _tear_the_manifest,
    _take_anothers_manifest,
]


@pytest.fixture(params=DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def damage(request: pytest.FixtureRequest) -> Callable[[PosixTier, Manifest], None]:
    found: Callable[[PosixTier, Manifest], None] = request.param
    return found


Damage = Callable[[PosixTier, Manifest], None]


def test_a_damaged_local_copy_is_set_aside_and_the_remote_one_used(
    local: PosixTier, remote: PosixTier, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    for tier in (local, remote):
        commit_checkpoint(tier, OLD)
        manifest = commit_checkpoint(tier, NEW)
    damage(local, manifest)
    assert_restored(local, remote, NEW, "remote")
    assert any(str(NEW) in record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert local.list(layout.DAMAGED) == [f"000-{NEW}"]
    aside = local.list(f"{layout.DAMAGED}/000-{NEW}")
    assert f"{NEW}.json" in aside and (damage is _lose_all_files or str(NEW) in aside)
    incarnation.claim(local, remote, 0.0)
    assert_run_invariants(local, remote, durable=NEW)


def test_a_damaged_remote_copy_gives_way_to_the_next_older_one(
    local: PosixTier, remote: PosixTier, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    commit_checkpoint(remote, OLD)
    damage(remote, commit_checkpoint(remote, NEW))
    before = tree(remote.root)
    restored = restore(local, remote)
    assert restored is not None and (restored.manifest.name, restored.source) == (OLD, "remote")
    assert [record.getMessage() for record in caplog.records if str(NEW) in record.getMessage()]
    assert catalog.names(local) == [OLD]
    assert tree(remote.root) == before


def test_damage_on_both_tiers_gives_way_to_the_next_older_one(
    local: PosixTier, remote: PosixTier, damage: Damage
) -> None:
    for tier in (local, remote):
        commit_checkpoint(tier, OLD)
        damage(tier, commit_checkpoint(tier, NEW))
    restored = restore(local, remote)
    assert restored is not None and (restored.manifest.name, restored.source) == (OLD, "local")


def test_a_damaged_local_checkpoint_that_was_never_drained_gives_way_to_the_remote_one(
    local: PosixTier, remote: PosixTier, damage: Damage
) -> None:
    commit_checkpoint(remote, OLD)
    damage(local, commit_checkpoint(local, NEW))
    assert_restored(local, remote, OLD, "remote")


def test_when_all_are_damaged_the_error_names_each_and_nothing_is_deleted(
    local: PosixTier, remote: PosixTier, damage: Damage
) -> None:
    names = [CheckpointName(1, 10), CheckpointName(1, 20), CheckpointName(2, 5)]
    for name in names:
        damage(remote, commit_checkpoint(remote, name))
    damage(local, commit_checkpoint(local, names[-1]))
    before = tree(remote.root), tree(local.root)
    with pytest.raises(CorruptCheckpointError, match="Nothing was deleted") as caught:
        restore(local, remote)
    for name in names:
        assert str(name) in str(caught.value)
    assert {**before[1], **tree(local.root)} == tree(local.root)  # nothing gone; downloads may have left staging
    assert tree(remote.root) == before[0]


def test_the_error_is_the_same_when_it_is_tried_again(local: PosixTier, remote: PosixTier) -> None:
    _flip_a_bit(remote, commit_checkpoint(remote, NEW))
    for _ in range(2):
        with pytest.raises(CorruptCheckpointError, match=str(NEW)):
            restore(local, remote)


# -- the agent of the life before goes on ----------------------------------------------------------------------


class SupersededRemote(PosixTier):
    """Each time a manifest is read another life's agent commits the next checkpoint first, and prunes the others."""

    def __init__(self, root: Path, *, times: int, is_sound: bool = True) -> None:
        super().__init__(root)
        self._left, self._is_sound = times, is_sound

    def read(self, path: str) -> bytes:
        if self._left > 0 and path.startswith(layout.MANIFESTS):
            self._left -= 1
            agents = PosixTier(self.root)
            before = catalog.names(agents)
            manifest = commit_checkpoint(agents, CheckpointName(1, before[0].step + 10))
            if not self._is_sound:
                _flip_a_bit(agents, manifest)
            retention.delete_checkpoints(agents, before)
        return super().read(path)


@pytest.mark.parametrize("times", [1, 3])
def test_what_superseded_all_that_was_listed_is_found(local: PosixTier, remote: PosixTier, times: int) -> None:
    commit_checkpoint(remote, OLD)
    expected = CheckpointName(1, OLD.step + 10 * times)
    assert_restored(local, SupersededRemote(remote.root, times=times), expected, "remote")


def test_a_damaged_successor_is_no_fresh_start(local: PosixTier, remote: PosixTier) -> None:
    commit_checkpoint(remote, OLD)
    with pytest.raises(CorruptCheckpointError, match="Nothing was deleted") as caught:
        restore(local, SupersededRemote(remote.root, times=1, is_sound=False))
    assert f"manifest {OLD} vanished" in str(caught.value)
    assert f"{NEW}/checkpoint-20/model.bin does not have the digest" in str(caught.value)


def test_an_agent_that_is_always_faster_is_not_chased_for_ever(local: PosixTier, remote: PosixTier) -> None:
    commit_checkpoint(remote, OLD)
    with pytest.raises(CorruptCheckpointError, match="none is valid"):
        restore(local, SupersededRemote(remote.root, times=1_000))
    assert len(catalog.names(remote)) == 1


# -- a tier that cannot be read --------------------------------------------------------------------------------


def test_a_remote_that_refuses_connections_is_no_fresh_start(local: PosixTier) -> None:
    commit_checkpoint(local, OLD)
    with pytest.raises(TierError):
        restore(local, FsspecTier("s3://bucket/run", s3_options(free_port())))


def test_a_remote_without_permission_is_no_fresh_start(local: PosixTier) -> None:
    with RefusingServer(403, "AccessDenied") as server, pytest.raises(TierDeniedError):
        restore(local, FsspecTier("s3://bucket/run", server.options))


def test_a_remote_whose_reads_are_forbidden_is_no_fresh_start(local: PosixTier, remote: PosixTier) -> None:
    """Listing is allowed, reading is not: no reason to call what is there damaged."""
    commit_checkpoint(remote, NEW)
    plan = FaultPlan(Fault(operation="read", count=None, error=lambda: TierDeniedError("no")))
    with pytest.raises(TierDeniedError):
        restore(local, FaultyTier(remote, plan))


def test_a_missing_bucket_is_no_fresh_start(local: PosixTier, s3_server: S3Server) -> None:
    with pytest.raises(TierDeniedError, match="bucket"):
        restore(local, FsspecTier("s3://no-such-bucket/run", s3_server.options))


def test_a_local_folder_that_cannot_be_listed_is_no_fresh_start(local: PosixTier, remote: PosixTier) -> None:
    local.create(layout.MANIFESTS, b"a file where the folder belongs")
    with pytest.raises(TierError):
        restore(local, remote)


@pytest.mark.parametrize("operation", ["list", "read", "download"])
def test_an_outage_does_not_fall_back_to_an_older_checkpoint(
    local: PosixTier, remote: PosixTier, operation: str
) -> None:
    commit_checkpoint(remote, OLD)
    commit_checkpoint(remote, NEW)
    plan = FaultPlan(Fault(operation=operation))
    with pytest.raises(TierError):
        restore(local, FaultyTier(remote, plan))
    assert plan.fired
    assert_restored(local, FaultyTier(remote, plan), NEW, "remote")


def test_an_outage_while_replacing_a_damaged_copy_keeps_the_damaged_copy(local: PosixTier, remote: PosixTier) -> None:
    for tier in (local, remote):
        manifest = commit_checkpoint(tier, NEW)
    _flip_a_bit(local, manifest)
    before = tree(local.root)
    with pytest.raises(TierError):
        restore(local, FaultyTier(remote, FaultPlan(Fault(operation="download", first=3))))
    after = tree(local.root)
    assert {path: after.get(path) for path in before} == before
    assert_restored(local, remote, NEW, "remote")


# -- crashes while restoring -----------------------------------------------------------------------------------


def _damaged_pair(folder: Path) -> tuple[PosixTier, PosixTier]:
    local, remote = PosixTier(folder / "local"), PosixTier(folder / "remote")
    incarnation.claim(local, remote, 0.0)
    for tier in (local, remote):
        commit_checkpoint(tier, OLD)
        manifest = commit_checkpoint(tier, NEW)
    _flip_a_bit(local, manifest)
    return local, remote


def _operations(folder: Path) -> int:
    local, remote = _damaged_pair(folder)
    plan = FaultPlan()
    restore(FaultyPosixTier(local.root, plan), FaultyTier(remote, plan))
    return len(plan.operations)


def test_a_crash_anywhere_while_restoring_costs_nothing(memory_path: Path) -> None:
    count = _operations(memory_path / "counted")
    assert count > 10
    moments: tuple[When, ...] = MOMENTS
    for nth, when in product(range(1, count + 1), moments):
        local, remote = _damaged_pair(memory_path / f"{nth}-{when}")
        plan = FaultPlan.crash_at(nth, when)
        with pytest.raises(SimulatedCrash):
            restore(FaultyPosixTier(local.root, plan), FaultyTier(remote, plan))
        assert len(plan.fired) == 1
        restored = restore(local, remote)
        assert restored is not None and restored.manifest.name == NEW, plan.fired
        assert_run_invariants(local, remote, durable=NEW)
