"""Storage fails in the middle of training: training goes on, says so once, and nothing that was safe is lost."""

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

from spot_core.store import catalog, resume
from spot_core.store.posix import PosixTier
from tests.disk import mounted
from tests.hf.job import JobSpec
from tests.lives.lives import Life, assert_same_training, live, lose_instance, remote_of, uninterrupted, wait_for


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that holds a few checkpoints of the test job and no more."""
    with mounted(tmp_path / "small", "size=420k") as folder:
        yield folder


def test_full_disk_does_not_stop_training(small_disk: Path, tmp_path: Path) -> None:
    spec = JobSpec(
        folder=str(tmp_path / "job"), options={"local": str(small_disk), "keep_local": 2}, has_overflow=False
    )
    reference = uninterrupted(spec, tmp_path / "reference")
    life = Life(dataclasses.replace(spec, arguments={"num_train_epochs": 9}, dies="step:60"))
    wait_for(lambda: len(catalog.names(PosixTier(small_disk / "job"))) > 0)
    filler = small_disk / "someone else's file"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 1024):
            pass
    result = life.result()
    assert result.exit_code == -signal.SIGKILL, "it trained on until it was killed"
    assert result.log.count("not written (") == 1, result.log[-3000:]
    assert "training goes on" in result.log
    assert filler.exists()
    newest = catalog.names(PosixTier(small_disk / "job"))[0]
    resume.verify(PosixTier(small_disk / "job"), catalog.read_manifest(PosixTier(small_disk / "job"), newest))
    filler.unlink()
    lose_instance(small_disk / "job")
    shutil.rmtree(spec.folder)
    assert live(spec).exit_code == 0
    assert_same_training(spec, reference)


def test_remote_that_goes_away_is_told_once_and_drained_when_it_is_back(tmp_path: Path) -> None:
    spec = JobSpec(folder=str(tmp_path / "job"), arguments={"num_train_epochs": 25})
    remote = remote_of(spec)
    life = Life(spec)
    wait_for(lambda: len(catalog.names(remote)) > 0)
    away = remote.root.with_name("away")
    os.rename(remote.root, away)
    remote.root.write_text("not a folder")
    wait_for(lambda: "drain failed, training goes on" in life.log)
    remote.root.unlink()
    os.rename(away, remote.root)
    result = life.result()
    assert result.exit_code == 0, result.log[-3000:]
    assert catalog.names(remote)[0].step == 250
    resume.verify(remote, catalog.read_manifest(remote, catalog.names(remote)[0]))


def test_agent_that_dies_is_started_again(tmp_path: Path) -> None:
    spec = JobSpec(folder=str(tmp_path / "job"), arguments={"num_train_epochs": 12})
    remote = remote_of(spec)
    life = Life(spec)
    wait_for(lambda: len(catalog.names(remote)) > 0)
    (agent,) = (child for child in psutil.Process(life.pid).children() if "spot_core.agent" in child.cmdline())
    agent.kill()
    result = life.result()
    assert result.exit_code == 0, result.log[-3000:]
    assert "the agent ended with code -9, starting it again" in result.log
    assert catalog.names(remote)[0].step == 120


def test_remote_that_may_not_be_written_is_refused_at_start(tmp_path: Path) -> None:
    with mounted(tmp_path / "read-only", "ro") as folder:
        result = live(JobSpec(folder=str(tmp_path / "job"), options={"remote": f"{folder}/job"}))
    assert result.exit_code == 1
    assert "refuses: " in result.log
    assert "Read-only file system" in result.log
    assert "needs to list, read, write and delete there" in result.log
    assert not Path(tmp_path, "job", "final.pt").exists()
