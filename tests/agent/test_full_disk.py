"""A full local disk: checkpoints pass it by in memory, restores say what does not fit, and memory is given back."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from pathlib import Path

import pytest

from spot_core.agent import local_run
from spot_core.agent.journal import AgentStatus, Journal, Progress
from spot_core.errors import ConfigError, TierError
from spot_core.report.cli import main
from spot_core.report.draining import open_drain
from spot_core.store import catalog, layout, retention
from spot_core.store.layout import CheckpointName
from spot_core.store.overflow import PLACE, Overflow
from spot_core.store.posix import PosixTier
from spot_core.testing.checkpoints import commit_checkpoint
from spot_core.testing.faults import Fault, FaultPlan, FaultyTier
from spot_core.testing.invariants import assert_run_invariants
from tests.agent.draining import FOUR, ONE, THREE, TWO, drain_all, make_drain
from tests.agent.place import Place
from tests.agent.processes import eventually, wait_for_end
from tests.agent.test_local_run import OneLife
from tests.disk import fill
from tests.opening import overflow_of

LARGE = 200_000
NEXT = CheckpointName(2, 50)


# -- the drain -------------------------------------------------------------------------------------------------


def test_both_places_are_drained_newest_first(local: PosixTier, remote: PosixTier, over: Overflow) -> None:
    for tier, name in ((local, ONE), (over.make(), TWO), (local, THREE), (over.make(), FOUR)):
        commit_checkpoint(tier, name)
    drain = make_drain(local, remote, keep_local=4, keep_remote=4, overflow=over)
    assert drain_all(drain) == [FOUR, THREE, TWO, ONE]
    assert catalog.names(remote) == [FOUR, THREE, TWO, ONE] and catalog.names(local) == [THREE, ONE]
    assert over.names() == [], "memory is given back as soon as it is durable"
    assert_run_invariants(local, remote, durable=FOUR)


def test_memory_is_kept_until_it_is_durable(local: PosixTier, remote: PosixTier, over: Overflow) -> None:
    commit_checkpoint(local, ONE)
    drain = make_drain(
        local,
        FaultyTier(remote, FaultPlan(Fault(operation="create", path=layout.manifest(TWO), count=1))),
        overflow=over,
    )
    drain_all(drain)
    commit_checkpoint(over.make(), TWO)
    with pytest.raises(TierError):
        drain.step(lambda *_: None)
    assert over.names() == [TWO]
    assert drain_all(drain) == [TWO]
    assert over.names() == []


def test_what_a_newer_one_made_worthless_is_dropped_from_memory(
    local: PosixTier, remote: PosixTier, over: Overflow
) -> None:
    for name in (ONE, TWO):
        commit_checkpoint(over.make(), name)
    commit_checkpoint(local, THREE)
    assert drain_all(make_drain(local, remote, keep_remote=1, overflow=over)) == [THREE]
    assert over.names() == []


def test_a_pinned_one_in_memory_goes_first(local: PosixTier, remote: PosixTier, over: Overflow) -> None:
    commit_checkpoint(over.make(), ONE)
    commit_checkpoint(local, TWO, pins=ONE)
    assert drain_all(make_drain(local, remote, keep_remote=1, overflow=over)) == [ONE, TWO]


def test_what_a_life_resumed_from_stays_until_it_has_committed(
    local: PosixTier, remote: PosixTier, over: Overflow
) -> None:
    """Its trainer may still be loading it."""
    commit_checkpoint(over.make(), ONE)
    drain = make_drain(local, remote, number=2, overflow=over)
    assert drain_all(drain) == [ONE]
    assert over.names() == [ONE]
    commit_checkpoint(local, NEXT)
    assert drain_all(drain) == [NEXT]
    assert over.names() == []


def test_the_end_of_training_in_memory_is_drained(local: PosixTier, remote: PosixTier, over: Overflow) -> None:
    commit_checkpoint(over.make(), ONE)
    drain = make_drain(local, remote, overflow=over)
    assert drain_all(drain) == [ONE]
    catalog.mark_complete(over.make(), ONE, 10)  # after its checkpoint was drained and dropped
    assert drain_all(drain) == []
    assert catalog.completions(remote) == {ONE: 10}


@pytest.mark.parametrize("kind", ["a file in its place", "unreadable"])
def test_without_the_local_folder_memory_is_drained_and_nothing_else_is_deleted(
    kind: str, tmp_path: Path, remote: PosixTier, over: Overflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = PosixTier(tmp_path / "local")
    for name in (ONE, TWO, THREE):
        commit_checkpoint(remote, name)
    commit_checkpoint(local, FOUR, pins=ONE)
    commit_checkpoint(over.make(), CheckpointName(1, 50))
    names = catalog.names
    if kind == "unreadable":
        monkeypatch.setattr(catalog, "names", lambda tier: _broken() if tier is local else names(tier))
    else:
        shutil.rmtree(local.root)
        local.root.touch()
    drain = make_drain(local, remote, keep_remote=1, overflow=over)
    assert drain.step(lambda *_: None) is not None
    assert names(remote) == [CheckpointName(1, 50), THREE, TWO, ONE], "what the local one pins is not known now"
    assert names(PosixTier(over.make().root)) == []
    monkeypatch.undo()


def _broken() -> list[CheckpointName]:
    raise TierError(5, "cannot list: Input/output error")


def test_a_checkpoint_deleted_while_it_is_verified_is_not_called_damaged(
    local: PosixTier, remote: PosixTier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (ONE, TWO):
        commit_checkpoint(local, name)
    record = PosixTier.record

    def deleted_before(tier: PosixTier, path: str) -> object:
        if tier is local and str(TWO) in path:
            retention.delete_checkpoints(local, [TWO])
        return record(tier, path)

    monkeypatch.setattr(PosixTier, "record", deleted_before)
    drain = make_drain(local, remote)
    assert drain_all(drain) == [ONE]
    assert drain.refused == frozenset()
    assert not caplog.records


# -- the trainer's side ----------------------------------------------------------------------------------------


@pytest.fixture
def life(disk: Path, memory: Path) -> OneLife:
    life = OneLife(disk, has_overflow=True)
    fill(disk / "someone else's file", leave_bytes=12_000)
    return life


def test_one_warning_and_the_reason_while_checkpoints_pass_the_disk_by(
    life: OneLife, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for name in (THREE, FOUR):
        tier = life.prepare(LARGE)
        assert tier.root == life.overflow.folder
        commit_checkpoint(tier, name)
        assert not life.run.add(name)
        assert not life.run.is_lost(name) and life.run.remote_only.startswith(f"no room in {life.tier.url}")
    with pytest.raises(TierError, match=r"nor is there room in memory: .* holds 2 checkpoints"):
        life.prepare(LARGE)
    assert life.run.is_short and not life.run.remote_only
    (disk / "someone else's file").unlink()
    life.agent.durable = frozenset({ONE, TWO, THREE, FOUR})
    life.overflow.clear(but=[FOUR])
    fill(disk / "someone else's file", leave_bytes=4096)
    assert life.prepare(LARGE).root == life.overflow.folder
    (disk / "someone else's file").unlink()
    assert life.prepare(LARGE) is life.tier and not life.run.remote_only
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.levelno for record in told] == [logging.WARNING], "ten minutes have not passed"
    assert "checkpoints go to the remote without the local disk, through memory" in told[0].message
    assert "there is room in" in caplog.text


def test_what_lasts_is_told_once_and_what_comes_back_after_a_while_again(
    life: OneLife, disk: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_run, "_TELL_AGAIN_S", 0.0)
    life.prepare(LARGE)
    life.prepare(LARGE)
    assert len(caplog.records) == 1
    (disk / "someone else's file").unlink()
    life.prepare(LARGE)
    fill(disk / "someone else's file", leave_bytes=12_000)
    life.prepare(LARGE)
    assert len(caplog.records) == 2


def test_a_disk_that_refuses_a_write_is_passed_by(life: OneLife, disk: Path) -> None:
    (disk / "someone else's file").unlink()
    tier = life.prepare(100, OSError(122, "Disk quota exceeded"))
    assert tier.root == life.overflow.folder and life.run.remote_only == "Disk quota exceeded"


def test_a_life_tries_again_while_its_grace_lasts(life: OneLife, disk: Path) -> None:
    for name in (THREE, FOUR):
        commit_checkpoint(life.prepare(LARGE), name)
        life.run.add(name)
    attempts = []

    def commit() -> None:
        attempts.append(1)
        if len(attempts) == 2:
            life.overflow.clear(but=[FOUR])  # as the agent does when it has drained one
        with contextlib.suppress(TierError):
            life.prepare(LARGE)

    life.run.until_it_fits(commit, time.monotonic() + 60)
    assert len(attempts) == 2
    life.overflow.clear(but=[])
    commit_checkpoint(life.prepare(LARGE), THREE)
    commit_checkpoint(life.prepare(LARGE), FOUR)
    began, attempts[:] = time.monotonic(), [1, 1]
    life.run.until_it_fits(commit, began + 2.5)
    assert len(attempts) > 3, "until the deadline"


def test_what_the_full_disk_does_not_take_is_told_through_memory(
    life: OneLife, disk: Path, memory: Path, tmp_path: Path
) -> None:
    journal = Journal(life.tier.root, 1, life.overflow)
    reader = Journal(life.tier.root, 1, life.overflow)
    assert journal.write_status(AgentStatus(pid=1))
    fill(disk / "yet another file")
    assert not journal.write_status(AgentStatus(pid=2))
    assert reader.read_status() == AgentStatus(pid=2), "the older one is still on the disk"
    journal.write_outcome("completed")
    assert reader.read_status() == AgentStatus(pid=2) and reader.read_outcome() == "completed"
    (disk / "yet another file").unlink()
    assert journal.write_status(AgentStatus(pid=3))
    assert reader.read_status() == AgentStatus(pid=3), "the newer one counts"
    life.run.close()
    assert os.listdir(memory) == []


def test_progress_says_why_the_disk_is_passed_by(life: OneLife) -> None:
    said = Progress(26, 2.6, 0, 1, "failed", "no room")
    life.run.write_progress(said)
    assert life.journal.read_progress() == said
    assert Progress.unpack(said.pack()[:512]) == Progress(26, 2.6, 0, 1, "failed"), "of an earlier release"


# -- processes and commands ------------------------------------------------------------------------------------


def test_the_agent_of_a_dead_trainer_drains_memory_and_gives_it_back(memory: Path, place: Place) -> None:
    trainer = place.opened()
    over = overflow_of(place.remote)
    commit_checkpoint(over.make(), ONE)
    over.make().stage(TWO)  # it was writing when it was killed
    trainer.kill()
    wait_for_end(trainer)
    assert catalog.names(place.remote) == [ONE]
    assert os.listdir(memory) == []


def test_a_fenced_life_gives_memory_back(memory: Path, place: Place) -> None:
    trainer = place.opened()
    over = overflow_of(place.remote)
    commit_checkpoint(over.make(), CheckpointName(1, 5))
    eventually(lambda: catalog.names(place.remote), "the agent looks there")
    place.remote.create(layout.incarnation(2), b"{}")  # on another machine
    commit_checkpoint(over.make(), ONE)
    wait_for_end(trainer)
    assert catalog.names(place.remote) == [CheckpointName(1, 5)]
    assert os.listdir(memory) == []


def test_what_a_killed_life_left_in_memory_goes_with_the_next_one(memory: Path, place: Place) -> None:
    first = place.opened()
    over = overflow_of(place.remote)
    os.kill(first.agent, 9)
    first.kill()
    commit_checkpoint(over.make(), ONE)
    over.make().stage(TWO)
    second = place.opened()
    eventually(lambda: catalog.names(place.remote) == [ONE], "it is drained")
    assert over.make().list(layout.STAGING) == []
    second.do("commit", 50)
    eventually(lambda: catalog.names(place.remote)[:1] == [NEXT], "it goes on")
    eventually(lambda: over.names() == [], "and memory is given back")
    second.do("outcome", "completed")
    wait_for_end(second)
    assert os.listdir(memory) == []


def test_memory_is_drained_by_hand(memory: Path, place: Place) -> None:
    trainer = place.opened()
    os.kill(trainer.agent, 9)
    trainer.kill()
    commit_checkpoint(overflow_of(place.remote).make(), ONE)
    open_drain(place.local.root, place.remote.url, {}, keep_local=None, keep_remote=None).once()
    assert catalog.names(place.remote) == [ONE]
    assert os.listdir(memory) == []


def test_status_shows_that_and_why_checkpoints_pass_the_disk_by(
    memory: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = place.opened()
    os.kill(trainer.agent, 9)
    commit_checkpoint(overflow_of(place.remote).make(), ONE)
    Journal(place.local.root, 1).open_progress(Progress(11, 1.0, 0, 0, "", "no room in /there: 2 MB needed"))
    with contextlib.suppress(SystemExit):
        main(["status", place.remote.url, "--local", str(place.local.root)])
    shown = capsys.readouterr().out
    assert "no room in /there: 2 MB needed" in shown and "checkpoints go to the remote through memory" in shown
    assert f"{ONE}: lost with this machine" in shown


def test_a_disk_too_small_for_a_checkpoint_is_accepted_where_memory_is_not(
    memory: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spot_core.store.overflow import room_bytes
    from spot_core.store.posix import check_usable

    check_usable(disk / "run", 2_000_000, elsewhere_bytes=room_bytes())
    monkeypatch.setenv(PLACE, "")
    with pytest.raises(ConfigError, match="a checkpoint needs about 2 MB"):
        check_usable(disk / "run", 2_000_000, elsewhere_bytes=room_bytes())
