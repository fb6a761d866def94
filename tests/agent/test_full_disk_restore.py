"""A restore where the local disk is full: to memory, onto room that is made, or a refusal that says what is needed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from spot_core.errors import ConfigError
from spot_core.store import catalog, identity, layout, resume, retention
from spot_core.store.layout import CheckpointName
from spot_core.store.overflow import PLACE
from spot_core.store.posix import PosixTier
from spot_core.testing.checkpoints import commit_checkpoint, content_of
from spot_core.testing.faults import FaultPlan, FaultyTier
from tests.agent.draining import ONE, THREE, TWO
from tests.disk import fill
from tests.opening import IDENTITY, open_run, overflow_of


def commit_large(tier: PosixTier, name: CheckpointName, *, pins: CheckpointName | None = None) -> None:
    files = {**content_of(name), f"checkpoint-{name.step}/padding.bin": bytes(200_000)}
    commit_checkpoint(tier, name, files=files, pins=pins)


@pytest.fixture
def small(disk: Path, remote: PosixTier, without_waiting: None) -> PosixTier:
    """The local tier, on a small disk, after a life whose one checkpoint is on the remote only."""
    tier = PosixTier(disk / "run")
    identity.create_run(tier, remote, IDENTITY, 0.0)
    commit_large(remote, ONE)
    return tier


@pytest.mark.usefixtures("memory")
def test_the_newest_is_resumed_from_memory_where_it_is(small: PosixTier, remote: PosixTier) -> None:
    over = overflow_of(remote)
    commit_large(over.make(), TWO)
    opened = open_run(small, remote)
    assert opened.restored is not None
    assert (opened.restored.manifest.name, opened.restored.source) == (TWO, "overflow")
    assert catalog.names(small) == [] and over.names() == [TWO]
    assert not over.remove(1), "the life before may not delete what is about to be loaded"


@pytest.mark.usefixtures("memory")
def test_a_damaged_copy_in_memory_gives_way_to_the_remote_one(small: PosixTier, remote: PosixTier) -> None:
    over = overflow_of(remote)
    commit_large(over.make(), ONE)
    over.make().path(f"{layout.checkpoint(ONE)}/checkpoint-10/model.bin").write_bytes(b"damaged")
    opened = open_run(small, remote)
    assert opened.restored is not None and opened.restored.source == "remote"
    assert catalog.names(small) == [ONE] and over.names() == []


@pytest.mark.usefixtures("memory")
def test_a_whole_copy_in_memory_is_used_although_the_local_one_is_damaged(small: PosixTier, remote: PosixTier) -> None:
    over = overflow_of(remote)
    for tier in (small, over.make()):
        commit_large(tier, TWO)
    small.path(f"{layout.checkpoint(TWO)}/checkpoint-20/model.bin").write_bytes(b"damaged")
    opened = open_run(small, remote)
    assert opened.restored is not None and opened.restored.source == "overflow"
    assert catalog.names(small) == [] and small.list(layout.DAMAGED) == [f"000-{TWO}"]


@pytest.mark.usefixtures("memory")
def test_what_a_full_disk_cannot_hold_is_restored_to_memory(
    small: PosixTier, remote: PosixTier, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit_large(remote, TWO, pins=ONE)
    fill(disk / "someone else's file", leave_bytes=40_000)
    opened = open_run(small, remote)
    assert opened.restored is not None and opened.restored.source == "remote" and opened.pin == ONE
    assert overflow_of(remote).names() == [TWO, ONE] and catalog.names(small) == []
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2 and all("is restored to memory" in warning for warning in warnings)
    assert opened.incarnation == 2 and small.list(layout.INCARNATIONS) == ["000002.json"]


def test_a_restore_that_fits_nowhere_says_what_is_needed_and_downloads_nothing(
    small: PosixTier, remote: PosixTier, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLACE, "")
    fill(disk / "someone else's file", leave_bytes=40_000)
    plan = FaultPlan()
    with pytest.raises(ConfigError) as caught:
        open_run(small, FaultyTier(remote, plan))
    assert f"checkpoint {ONE} of {remote.url} cannot be restored: no room in {small.url}: 0.2 MB needed" in str(
        caught.value
    )
    for part in ("MB free", "Training was not started", "is on the remote", "SPOT_LOCAL"):
        assert part in str(caught.value)
    assert not [line for line in plan.operations if "download" in line or "create" in line]
    assert "could not be reached" not in str(caught.value)


@pytest.mark.parametrize("kind", ["superseded", "set aside", "the damaged one"])
def test_a_restore_makes_room_of_damaged_and_superseded_copies_that_are_durable(
    kind: str, small: PosixTier, remote: PosixTier, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLACE, "")
    for name in (TWO, THREE):
        commit_large(remote, name)
        commit_large(small, name)
    if kind == "set aside":
        small.set_aside(TWO)
    elif kind == "the damaged one":
        retention.delete_checkpoints(small, [TWO])
    unknown = CheckpointName(1, 15)
    commit_large(small, unknown)
    small.path(f"{layout.checkpoint(THREE)}/checkpoint-30/model.bin").write_bytes(b"damaged")
    fill(disk / "someone else's file", leave_bytes=40_000)
    opened = open_run(small, remote)
    assert opened.restored is not None and (opened.restored.manifest.name, opened.restored.source) == (THREE, "remote")
    resume.verify(small, catalog.read_manifest(small, THREE))
    assert catalog.names(small) == [THREE, unknown], "the older one is durable nowhere"
    assert small.list(layout.DAMAGED) == ([f"000-{THREE}"] if kind != "the damaged one" else [])


def test_a_disk_without_any_room_is_not_blamed_on_the_remote(
    small: PosixTier, remote: PosixTier, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLACE, "")
    retention.delete_checkpoints(remote, [ONE])
    fill(disk / "someone else's file")
    with pytest.raises(ConfigError, match=f"the local folder {small.url} cannot be written: No space left on device"):
        open_run(small, remote)
