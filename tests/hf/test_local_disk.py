"""The local disk fills up, is emptied or is taken away while a life trains: it trains on and ends bit-equal."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from spot_core.agent.journal import AgentStatus, Journal, Progress
from spot_core.agent.lives import COMPLETED, read_lives
from spot_core.report.places import open_run
from spot_core.report.status import LocalView, status
from spot_core.store import catalog, identity, layout, resume
from spot_core.store.layout import CheckpointName
from spot_core.store.overflow import Overflow
from spot_core.store.posix import PosixTier
from tests.disk import fill, mounted
from tests.hf.job import JobSpec
from tests.lives.lives import Life, LifeResult, assert_same_training, live, local_of, remote_of, uninterrupted, wait_for

STEPS = 120
REFUSED, REMOVED = "not written (", "was removed or emptied during training"
PAST_THE_DISK = "checkpoints go to the remote without the local disk"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    folder = tmp_path_factory.mktemp("reference")
    uninterrupted(_spec(folder), folder / "job")
    return dataclasses.replace(_spec(folder), has_callback=False)


def _spec(folder: Path) -> JobSpec:
    return JobSpec(folder=str(folder / "job"), interval_s=0.2, arguments={"num_train_epochs": STEPS // 10})


def _begun(spec: JobSpec, local: PosixTier) -> Life:
    """A life that has committed and drained."""
    life = Life(spec)
    wait_for(lambda: catalog.names(local) and catalog.names(remote_of(spec)))
    return life


def _assert_ended_well(result: LifeResult, spec: JobSpec, reference: JobSpec, *, told: str) -> None:
    """told: what is said about the disk, once."""
    assert result.exit_code == 0, result.log[-3000:]
    assert result.log.count(told) == 1, result.log[-3000:]
    assert_same_training(spec, reference)


def _assert_drained(spec: JobSpec) -> None:
    remote = remote_of(spec)
    name = catalog.names(remote)[0]
    assert name.step == STEPS
    resume.verify(remote, catalog.read_manifest(remote, name))
    assert catalog.completions(remote) == {name: STEPS}
    wait_for(lambda: not _overflow(spec).exists())


def test_a_life_trains_through_a_full_disk(tmp_path: Path, reference: JobSpec) -> None:
    """Checkpoints go to the remote through memory, and to the disk again as soon as it has room."""
    with mounted(tmp_path / "small", "size=600k") as disk:
        spec = dataclasses.replace(_spec(tmp_path), options={"local": str(disk)})
        local, remote = PosixTier(disk / "job"), remote_of(spec)
        life = _begun(spec, local)
        fill(disk / "someone else's file")
        wait_for(lambda: PAST_THE_DISK in life.log)
        known = catalog.names(remote)[0]
        wait_for(lambda: catalog.names(remote)[0] > known and catalog.names(remote)[0] not in catalog.names(local))
        wait_for(lambda: "no room in" in (_status(spec, disk).remote_only or ""))
        (disk / "someone else's file").unlink()
        wait_for(lambda: "there is room in" in life.log)
        result = life.result()
        _assert_ended_well(result, spec, reference, told=PAST_THE_DISK)
        # On a busy machine one may find both places of the overflow taken.
        assert result.log.count(REFUSED) == result.log.count("checkpoints that are not drained yet"), result.log[-3000:]
        resume.verify(local, catalog.read_manifest(local, catalog.names(local)[0]))
        assert local.list(layout.STAGING) == []
    _assert_drained(spec)


def test_a_disk_that_stays_full_costs_no_checkpoint(tmp_path: Path, reference: JobSpec) -> None:
    with mounted(tmp_path / "small", "size=600k") as disk:
        spec = dataclasses.replace(_spec(tmp_path), options={"local": str(disk)})
        local, remote = PosixTier(disk / "job"), remote_of(spec)
        life = _begun(spec, local)
        fill(disk / "someone else's file")
        result = life.result()
        _assert_ended_well(result, spec, reference, told=PAST_THE_DISK)
        assert "is not recorded" not in result.log and "training is complete but" not in result.log
        _assert_drained(spec)
        assert read_lives(remote)[-1].outcome == COMPLETED
        fill(disk / "someone else's file", leave_bytes=30_000)
        again = live(spec)
        assert again.exit_code == 0 and "checkpoint: step" not in again.log, again.log[-2000:]
        assert "is restored to memory" in again.log
    wait_for(lambda: not _overflow(spec).exists())


def test_without_memory_to_spare_a_full_disk_is_told_and_tried_again(tmp_path: Path, reference: JobSpec) -> None:
    with mounted(tmp_path / "small", "size=600k") as disk:
        spec = dataclasses.replace(_spec(tmp_path), options={"local": str(disk)}, has_overflow=False)
        local = PosixTier(disk / "job")
        life = _begun(spec, local)
        fill(disk / "someone else's file")
        wait_for(lambda: REFUSED in life.log)
        wait_for(lambda: _failures(Journal(local.root, 1).read_progress()) > 0)
        refused = catalog.names(local)
        (disk / "someone else's file").unlink()
        wait_for(lambda: catalog.names(local)[0] > refused[0])
        result = life.result()
        assert "checkpoints are written again, after" in result.log
        assert "Free space there" in result.log
        _assert_ended_well(result, spec, reference, told=REFUSED)
        assert PAST_THE_DISK not in result.log
        resume.verify(local, catalog.read_manifest(local, catalog.names(local)[0]))
        assert local.list(layout.STAGING) == []
        assert _failures(Journal(local.root, 1).read_status()) > 0, "what `spot status` shows"
    _assert_drained(spec)


@pytest.mark.parametrize("kills", ["trainer", "agent", "both"])
def test_kills_while_checkpoints_pass_by_a_full_disk(kills: str, tmp_path: Path, reference: JobSpec) -> None:
    """Whatever is killed, the next life continues from the newest checkpoint, wherever it is, and memory is freed."""
    with mounted(tmp_path / "small", "size=600k") as disk:
        spec = dataclasses.replace(_spec(tmp_path), options={"local": str(disk)})
        local, remote = PosixTier(disk / "job"), remote_of(spec)
        life = _begun(spec, local)
        fill(disk / "someone else's file", leave_bytes=30_000)
        wait_for(lambda: PAST_THE_DISK in life.log)
        with _down(remote):
            known = catalog.names(remote)[0]
            wait_for(lambda: (_in_memory(spec) or [known])[0] > known)
            if kills != "trainer":
                _kill_agent(local)
            if kills != "agent":
                life.kill()
            newest = _in_memory(spec)[0]
        if kills != "agent":
            assert life.result().exit_code == -9
            life = Life(spec)
        result = life.result()
        assert result.exit_code == 0, result.log[-3000:]
        if kills == "both":
            assert f"from the overflow tier, checkpoint {newest}" in result.log
    assert_same_training(spec, reference)
    _assert_drained(spec)


@pytest.mark.parametrize("term", [40, 100])
def test_a_preemption_on_a_full_disk_loses_no_step(term: int, tmp_path: Path, reference: JobSpec) -> None:
    with mounted(tmp_path / "small", "size=600k") as disk:
        spec = dataclasses.replace(_spec(tmp_path), options={"local": str(disk)})
        fill(disk / "someone else's file", leave_bytes=56_000)
        preempted = live(dataclasses.replace(spec, dies=f"term:{term}"))
        assert preempted.exit_code == 75, preempted.log[-3000:]
        assert f"preempted: step {term + 1} is durable on the remote" in preempted.log
        assert PAST_THE_DISK in preempted.log, "from the first checkpoint on"
        wait_for(lambda: not _overflow(spec).exists())
        result = live(spec)
        assert result.exit_code == 0, result.log[-3000:]
        assert f"resume: step {term + 1} from the remote tier" in result.log
        assert "is restored to memory" in result.log
    assert_same_training(spec, reference)
    _assert_drained(spec)


def _status(spec: JobSpec, local: Path) -> LocalView:
    view = status(open_run(f"{spec.folder}/remote/job", {}), local, now=0.0).local
    assert view is not None
    return view


def _overflow(spec: JobSpec) -> Path:
    remote = remote_of(spec)
    stored = identity.read_run(remote)
    assert stored is not None
    folder = Overflow.of(remote, stored["run_id"]).folder
    assert folder is not None, "these tests need a file system in memory"
    return folder


def _in_memory(spec: JobSpec) -> list[CheckpointName]:
    return Overflow(_overflow(spec)).names()


@contextlib.contextmanager
def _down(remote: PosixTier) -> Iterator[None]:
    """Nothing can be drained."""
    folder, aside = remote.path(layout.CHECKPOINTS), remote.path("aside")
    while not folder.is_file():
        with contextlib.suppress(OSError):
            os.rename(folder, aside)
            folder.touch(exist_ok=False)
    yield
    folder.unlink()
    os.rename(aside, folder)


def _kill_agent(local: PosixTier) -> None:
    said = Journal(local.root, 1).read_status()
    assert said is not None and "spot_core.agent" in psutil.Process(said.pid).cmdline()
    os.kill(said.pid, signal.SIGKILL)


def _failures(said: AgentStatus | Progress | None) -> int:
    return said.failures if said is not None else 0


def test_a_life_whose_local_folder_is_removed_makes_it_again(tmp_path: Path, reference: JobSpec) -> None:
    spec = _spec(tmp_path)
    local, remote = local_of(spec), remote_of(spec)
    life = _begun(spec, local)
    _remove(local.root)
    wait_for(lambda: REMOVED in life.log)
    result = life.result()
    _assert_ended_well(result, spec, reference, told=REMOVED)
    assert REFUSED not in result.log, "what was being written was still in memory"
    assert identity.read_run(local) == identity.read_run(remote)
    assert local.list(layout.INCARNATIONS) == ["000001.json"]
    assert local.list(layout.LIVES) == ["000001.json"]
    assert {"000001.agent.json", "000001.outcome.json", "000001.progress"} <= set(local.list(layout.JOURNAL))
    _assert_drained(spec)
    again = live(spec)
    assert again.exit_code == 0 and "checkpoint: step" not in again.log, again.log[-2000:]


def test_a_life_whose_local_folder_stays_unusable_goes_on_without_it(tmp_path: Path, reference: JobSpec) -> None:
    spec = _spec(tmp_path)
    local, remote = local_of(spec), remote_of(spec)
    life = _begun(spec, local)
    _take_away(local.root.parent)
    result = life.result()
    assert "is not recorded" not in result.log and "training is complete but" not in result.log
    _assert_ended_well(result, spec, reference, told=PAST_THE_DISK)
    _assert_drained(spec)
    assert read_lives(remote)[-1].outcome == COMPLETED
    local.root.parent.unlink()
    assert live(spec).exit_code == 0


def test_a_life_whose_local_folder_and_memory_are_unusable_ends_and_says_so(tmp_path: Path, reference: JobSpec) -> None:
    spec = dataclasses.replace(_spec(tmp_path), has_overflow=False)
    local, remote = local_of(spec), remote_of(spec)
    life = _begun(spec, local)
    _take_away(local.root.parent)
    result = life.result()
    assert "training is complete, but that is not recorded in" in result.log
    assert "run again, would repeat the training after that step" in result.log
    _assert_ended_well(result, spec, reference, told=REFUSED)
    resume.verify(remote, catalog.read_manifest(remote, catalog.names(remote)[0]))
    local.root.parent.unlink()
    assert live(spec).exit_code == 0
    _assert_drained(spec)


def _remove(folder: Path) -> None:
    """All at once: what is written from now on is written to a folder made again."""
    gone = folder.with_name("gone")
    os.rename(folder, gone)
    shutil.rmtree(gone)


def _take_away(folder: Path) -> None:
    """Remove a folder for good. Both processes try to make it again, and may be faster at first."""
    while folder.is_dir():
        _remove(folder)
        with contextlib.suppress(FileExistsError), open(folder, "x"):
            pass
