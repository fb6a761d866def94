"""The local folder of a life that is removed, emptied, taken or unusable while training goes on."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from spot_core.agent import local_run
from spot_core.agent.journal import AgentStatus, Journal, Progress
from spot_core.agent.local_run import LocalRun
from spot_core.errors import CommitConflictError, FencedError, TierError
from spot_core.store import catalog, identity, incarnation, layout
from spot_core.store.identity import RunIdentity
from spot_core.store.layout import CheckpointName
from spot_core.store.overflow import Overflow
from spot_core.store.posix import PosixTier
from spot_core.testing.checkpoints import commit_checkpoint
from tests.disk import mounted

ONE, TWO, THREE = (CheckpointName(1, step) for step in (10, 20, 30))


class FakeMonitor:
    """What the agent has said so far."""

    def __init__(self) -> None:
        self.durable: frozenset[CheckpointName] = frozenset()
        self.drain_failure: str | None = None
        self.is_waited_for = False

    @property
    def newest_durable(self) -> CheckpointName | None:
        return max(self.durable, default=None)

    def committed(self, name: CheckpointName) -> None: ...

    def wait_durable(self, name: CheckpointName, deadline: float) -> bool:
        self.is_waited_for = True
        self.durable |= {name}
        return True

    def wait_ended(self, deadline: float) -> None:
        self.is_waited_for = True


class OneLife:
    """Tiers, agent and journal of a life that committed ONE and TWO and drained ONE."""

    def __init__(self, folder: Path, *, has_overflow: bool = False) -> None:
        self.tier, self.remote = PosixTier(folder / "local" / "run"), PosixTier(folder / "remote" / "run")
        identity.create_run(self.tier, self.remote, RunIdentity("testing", {}), 0.0)
        number = incarnation.claim(self.tier, self.remote, 0.0)
        self.agent: Any = FakeMonitor()
        self.overflow = Overflow.of(self.remote, "an id") if has_overflow else Overflow(None)
        self.journal = Journal(self.tier.root, number, self.overflow)
        self.run = LocalRun(
            self.tier,
            self.journal,
            self.agent,
            number=number,
            progress=Progress(0, 0.0, 0),
            committed={},
            overflow=self.overflow,
        )
        for name in (ONE, TWO):
            commit_checkpoint(self.tier, name)
            self.run.add(name)
        self.agent.durable = frozenset({ONE})
        self.run.write_progress(Progress(25, 2.5, 0))
        self._manifest = catalog.read_manifest(self.tier, TWO)

    def prepare(self, expected_bytes: int = 100, failure: OSError | None = None) -> PosixTier:
        return self.run.prepare(self._manifest, expected_bytes, failure)


@pytest.fixture
def life(tmp_path: Path) -> OneLife:
    return OneLife(tmp_path)


def test_a_whole_folder_is_left_as_it_is(life: OneLife, caplog: pytest.LogCaptureFixture) -> None:
    life.prepare()
    assert not caplog.records


def test_of_short_steps_the_first_and_the_last_are_written_down(life: OneLife, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write takes as long as all else that a step costs."""
    monkeypatch.setattr(local_run, "_PROGRESS_EVERY_S", 3600.0)
    for step in range(26, 40):
        life.run.made_step(lambda step=step: Progress(step, step / 10, 0))  # type: ignore[misc]
    assert life.journal.read_progress() == Progress(26, 2.6, 0)
    life.run.end("stopped")
    assert life.journal.read_progress() == Progress(39, 3.9, 0)


def test_a_removed_folder_is_made_again_with_all_that_both_processes_need(
    life: OneLife, caplog: pytest.LogCaptureFixture
) -> None:
    before = {path: life.tier.read(path) for path in (layout.RUN, layout.incarnation(1))}
    shutil.rmtree(life.tier.root)
    assert life.run.is_lost(TWO) and not life.run.is_lost(ONE)
    life.run.write_progress(Progress(26, 2.6, 0))
    life.run.keep()
    assert {path: life.tier.read(path) for path in before} == before
    assert life.journal.read_progress() == Progress(26, 2.6, 0)
    life.run.write_progress(Progress(27, 2.7, 0, 3, "why"))
    assert Journal(life.tier.root, 1).read_progress() == Progress(27, 2.7, 0, 3, "why")
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "was removed or emptied during training (run.json, incarnations/000001.json, manifests/" in record.message
    assert f"Durable on the remote: step 10. Not known to have been drained: {TWO}." in record.message
    assert life.run.committed == {10: ONE}, "a later checkpoint must not refer to one that is gone"
    life.run.keep()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("part", ["journal", "manifests", "incarnations"])
def test_a_part_that_is_removed_is_noticed(part: str, life: OneLife, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(life.tier.path(part))
    life.run.keep()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert part in caplog.text
    assert life.journal.has_progress()


def test_a_folder_that_was_given_to_another_run_is_not_written_to(life: OneLife) -> None:
    shutil.rmtree(life.tier.root)
    life.tier.create(layout.RUN, b'{"format_version": 1, "run_id": "another"}')
    for _ in range(2):
        with pytest.raises(CommitConflictError, match=r"run\.json exists with other content"):
            life.prepare()
    assert not life.tier.path(layout.incarnation(1)).exists()


def test_a_folder_removed_by_a_newer_life_stays_that_lifes(life: OneLife) -> None:
    shutil.rmtree(life.tier.root)
    incarnation.claim(life.tier, life.remote, 0.0)
    with pytest.raises(FencedError):
        life.run.keep()


@pytest.mark.parametrize("kind", ["a file is in its place", "read-only"])
def test_while_the_folder_is_unusable_commits_are_refused_and_then_go_on(
    kind: str, life: OneLife, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(life.tier.root)
    if kind == "read-only":
        with mounted(life.tier.root, "ro"):
            _assert_unusable(life)
    else:
        life.tier.root.write_text("in the way")
        _assert_unusable(life)
        life.tier.root.unlink()
    assert not caplog.records, "the writer tells"
    life.run.keep()
    assert [record.levelno for record in caplog.records] == [logging.WARNING], "that it failed has been told"


def _assert_unusable(life: OneLife) -> None:
    with pytest.raises(TierError):
        life.run.keep()
    life.run.write_progress(Progress(26, 2.6, 0))  # costs nothing


def test_the_end_in_an_unusable_folder_is_told_and_not_waited_for(
    life: OneLife, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(life.tier.root)
    life.tier.root.write_text("in the way")
    life.run.mark_complete(20, 20)
    (record,) = caplog.records
    assert "training is complete, but that is not recorded in" in record.message
    assert "Durable on the remote: step 10." in record.message
    assert not life.run.end("completed")
    life.run.wait_drained(0.0, "s3://bucket/run")
    assert f"checkpoint {TWO} is not on the remote" in caplog.text
    assert "is gone. The same command, run again, repeats what is missing" in caplog.text


def test_the_end_after_the_folder_was_removed_is_recorded(life: OneLife) -> None:
    life.agent.durable = frozenset({ONE, TWO})
    shutil.rmtree(life.tier.root)
    life.run.mark_complete(20, 20)
    assert catalog.completions(life.tier) == {TWO: 20}
    assert identity.read_run(life.tier) is not None


def test_room_is_made_of_what_the_agent_has_reported_durable(life: OneLife, monkeypatch: pytest.MonkeyPatch) -> None:
    commit_checkpoint(life.tier, THREE)
    life.run.add(THREE)
    life.agent.durable = frozenset({ONE, TWO})
    usage = shutil._ntuple_diskusage(1 << 30, 0, 0)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(TierError, match="no room in"):
        life.prepare()
    assert catalog.names(life.tier) == [THREE, TWO]
    assert life.run.wait_for_room(1.0), "the end of training is worth waiting for the drain"
    with pytest.raises(TierError, match="no room in"):
        life.prepare()
    assert catalog.names(life.tier) == [THREE]


def test_only_a_lack_of_room_is_worth_waiting_for(life: OneLife) -> None:
    life.prepare()
    assert not life.run.wait_for_room(1.0)
    life.tier.path(layout.RUN).write_text("another run's")
    with pytest.raises(CommitConflictError):
        life.prepare()
    assert not life.run.wait_for_room(1.0)
    assert not life.agent.is_waited_for


def test_progress_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    import struct

    (tmp_path / "journal").mkdir()
    (tmp_path / "journal/000001.progress").write_bytes(struct.pack("<qdq", 7, 1.5, 3))
    assert Journal(tmp_path, 1).read_progress() == Progress(7, 1.5, 3)
    (tmp_path / "journal/000001.progress").write_bytes(b"torn")
    assert Journal(tmp_path, 1).read_progress() is None


def test_status_without_the_newer_fields_is_read(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal/000001.agent.json").write_text('{"pid": 7}')
    assert Journal(tmp_path, 1).read_status() == AgentStatus(pid=7)
