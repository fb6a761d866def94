"""The local disk fills up, is emptied or is taken away while a life trains: it trains on and ends bit-equal."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from spot_core.agent.journal import AgentStatus, Journal, Progress
from spot_core.store import identity, layout, resume
from spot_core.store.posix import PosixTier
from tests.disk import fill, mounted
from tests.hf.job import JobSpec
from tests.lives.lives import Life, LifeResult, assert_same_training, live, uninterrupted, wait_for

STEPS = 60
REFUSED, REMOVED = "not written (", "was removed or emptied during training"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    folder = tmp_path_factory.mktemp("reference")
    uninterrupted(_spec(folder), folder / "job")
    return dataclasses.replace(_spec(folder), has_callback=False)


def _spec(folder: Path) -> JobSpec:
    return JobSpec(folder=str(folder / "job"), arguments={"num_train_epochs": STEPS // 10})


def _begun(spec: JobSpec, local: PosixTier) -> Life:
    """A life that has committed and drained."""
    life = Life(spec)
    wait_for(lambda: resume.names(local) and resume.names(PosixTier(f"{spec.folder}/remote/job")))
    return life


def _assert_ended_well(result: LifeResult, spec: JobSpec, reference: JobSpec, *, told: str) -> None:
    """told: what is said about the disk, once."""
    assert result.exit_code == 0, result.log[-3000:]
    assert result.log.count(told) == 1, result.log[-3000:]
    assert_same_training(spec, reference)


def _assert_drained(spec: JobSpec) -> None:
    remote = PosixTier(f"{spec.folder}/remote/job")
    name = resume.names(remote)[0]
    assert name.step == STEPS
    resume.verify(remote, resume.read_manifest(remote, name))
    assert resume.completions(remote) == {name: STEPS}


def test_a_life_trains_through_a_full_disk(tmp_path: Path, reference: JobSpec) -> None:
    with mounted(tmp_path / "small", "size=420k") as disk:
        spec = dataclasses.replace(_spec(tmp_path), options={"local": str(disk)})
        local = PosixTier(disk / "job")
        life = _begun(spec, local)
        fill(disk / "someone else's file")
        wait_for(lambda: "not written (" in life.log)
        wait_for(lambda: _failures(Journal(local.root, 1).read_progress()) > 0)
        refused = resume.names(local)
        (disk / "someone else's file").unlink()
        wait_for(lambda: resume.names(local)[0] > refused[0])
        result = life.result()
        assert "checkpoints are written again, after" in result.log
        assert "Free space there" in result.log
        _assert_ended_well(result, spec, reference, told=REFUSED)
        resume.verify(local, resume.read_manifest(local, resume.names(local)[0]))
        assert local.list(layout.STAGING) == []
        assert _failures(Journal(local.root, 1).read_status()) > 0, "what `spot status` shows"
    _assert_drained(spec)


def _failures(said: AgentStatus | Progress | None) -> int:
    return said.failures if said is not None else 0


def test_a_life_whose_local_folder_is_removed_makes_it_again(tmp_path: Path, reference: JobSpec) -> None:
    spec = _spec(tmp_path)
    local, remote = PosixTier(f"{spec.folder}/local/job"), PosixTier(f"{spec.folder}/remote/job")
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


def test_a_life_whose_local_folder_stays_unusable_ends_and_says_so(tmp_path: Path, reference: JobSpec) -> None:
    spec = _spec(tmp_path)
    local, remote = PosixTier(f"{spec.folder}/local/job"), PosixTier(f"{spec.folder}/remote/job")
    life = _begun(spec, local)
    _take_away(local.root.parent)
    result = life.result()
    assert "training is complete, but that is not recorded in" in result.log
    assert "run again, would repeat the training after that step" in result.log
    _assert_ended_well(result, spec, reference, told=REFUSED)
    resume.verify(remote, resume.read_manifest(remote, resume.names(remote)[0]))
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
