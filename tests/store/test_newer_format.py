"""A manifest that a newer release wrote: told by name, passed over, and neither moved nor deleted."""

from __future__ import annotations

import logging

import pytest

from spot_core.errors import CorruptCheckpointError, NewerFormatError, TierError
from spot_core.store import catalog, layout, resume
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import FORMAT_VERSION
from spot_core.store.posix import PosixTier
from spot_core.store.volume import make_room
from spot_core.testing.checkpoints import commit_checkpoint
from tests.agent.draining import drain_all, make_drain
from tests.trees import tree

OLD, NEW, NEWEST = (CheckpointName(1, step) for step in (10, 20, 30))


def make_newer(tier: PosixTier, name: CheckpointName) -> None:
    version = f'"format_version": {FORMAT_VERSION}'
    body = tier.read(layout.manifest(name)).decode()
    assert version in body
    tier.replace(layout.manifest(name), body.replace(version, f'"format_version": {FORMAT_VERSION + 1}').encode())


def restore(local: PosixTier, remote: PosixTier) -> resume.Restored | None:
    return resume.newest_valid(local, remote, lambda *_: None)


@pytest.mark.parametrize("where", ["local", "remote", "both"])
def test_the_next_older_one_is_used_and_it_stays_where_it_is(
    where: str, local: PosixTier, remote: PosixTier, caplog: pytest.LogCaptureFixture
) -> None:
    commit_checkpoint(remote, OLD)
    for tier in {"local": [local], "remote": [remote], "both": [local, remote]}[where]:
        commit_checkpoint(tier, NEW)
        make_newer(tier, NEW)
    before = tree(local.root) if where != "remote" else {}, tree(remote.root)
    restored = restore(local, remote)
    assert restored is not None and restored.manifest.name == OLD
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert any(f"checkpoint {NEW} is of a newer format, trying the next older one" in line for line in said)
    assert "upgrade spot-callbacks" in caplog.text
    assert before[0].items() <= tree(local.root).items() and tree(remote.root) == before[1]
    assert local.list(layout.DAMAGED) == []


def test_the_other_tier_is_used_where_it_can_be_read(local: PosixTier, remote: PosixTier) -> None:
    """One of the two lost a bit of its version: what cannot be read is kept aside, as damage is."""
    for tier in (local, remote):
        commit_checkpoint(tier, NEW)
    make_newer(local, NEW)
    restored = restore(local, remote)
    assert restored is not None and (restored.manifest.name, restored.source) == (NEW, "remote")
    make_newer(remote, NEW)
    restored = restore(local, remote)
    assert restored is not None and (restored.manifest.name, restored.source) == (NEW, "local")


@pytest.mark.parametrize("where", ["local", "remote"])
def test_where_nothing_else_is_left_it_is_no_fresh_start(where: str, local: PosixTier, remote: PosixTier) -> None:
    tier = local if where == "local" else remote
    commit_checkpoint(tier, NEW)
    make_newer(tier, NEW)
    before = tree(tier.root)
    with pytest.raises(CorruptCheckpointError, match=f"manifest {NEW} has format version 2, this release reads 1"):
        restore(local, remote)
    assert tree(tier.root) == before
    with pytest.raises(NewerFormatError):
        catalog.read_manifest(tier, NEW)


def test_retention_deletes_it_on_neither_tier_and_tells_so_once(
    local: PosixTier, remote: PosixTier, caplog: pytest.LogCaptureFixture
) -> None:
    for tier in (local, remote):
        commit_checkpoint(tier, OLD)
        make_newer(tier, OLD)
    drain = make_drain(local, remote, keep_local=1, keep_remote=1)
    for name in (NEW, NEWEST):
        commit_checkpoint(local, name)
        drain_all(drain)
    assert catalog.names(local) == catalog.names(remote) == [NEWEST, OLD]
    assert caplog.text.count(f"checkpoint {OLD} stays where it is") == 1


def test_the_drain_leaves_it_to_a_newer_release(
    local: PosixTier, remote: PosixTier, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (OLD, NEW):
        commit_checkpoint(local, name)
    make_newer(local, NEW)
    assert drain_all(make_drain(local, remote)) == [OLD]
    assert f"local checkpoint {NEW} is of a newer format and is not drained" in caplog.text
    assert "damaged" not in caplog.text
    assert catalog.names(local) == [NEW, OLD]


def test_a_full_disk_does_not_cost_it(local: PosixTier) -> None:
    for name in (OLD, NEW, NEWEST):
        commit_checkpoint(local, name)
    make_newer(local, OLD)
    with pytest.raises(TierError, match="no room"):
        make_room(local, 1 << 60, durable={OLD, NEW, NEWEST})
    assert catalog.names(local) == [NEWEST, OLD]


@pytest.mark.parametrize("where", ["local", "remote"])
def test_files_without_a_manifest_are_never_resumed(where: str, local: PosixTier, remote: PosixTier) -> None:
    for tier in (local, remote):
        for name in (OLD, NEW):
            commit_checkpoint(tier, name)
    (local if where == "local" else remote).delete([layout.manifest(NEW)])
    restored = restore(local, remote)
    assert restored is not None and restored.manifest.name == NEW, "the other tier has it whole"
    for tier in (local, remote):
        tier.delete([layout.manifest(NEW)])
    restored = restore(local, remote)
    assert restored is not None and restored.manifest.name == OLD
