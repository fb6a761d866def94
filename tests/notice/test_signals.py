"""What the watcher of signals makes of a loader's dead workers, and of signals while everything is let go of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from multiprocessing import resource_sharer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from spot_core.errors import Preempted
from spot_core.notice.signals import SignalWatcher


@pytest.fixture
def watcher() -> Iterator[SignalWatcher]:
    watcher = SignalWatcher()
    watcher.install({signal.SIGUSR1: signal.SIG_DFL})
    yield watcher
    watcher.uninstall()


class Numbers(Dataset[torch.Tensor]):
    """error: what is raised in the worker after the first item."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if index and self._error is not None:
            raise self._error
        return torch.full((1000,), float(index))


class Vanishing(Numbers):
    """Its worker answers nobody any more once a second batch has been handed over, as one that is about to die."""

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 2:
            time.sleep(0.5)  # the one before is pickled by another thread
            resource_sharer.stop()
        return super().__getitem__(index)


def begun(dataset: Numbers) -> Any:
    """An iterator with one worker, after its first batch."""
    batches = iter(DataLoader(dataset, num_workers=1, prefetch_factor=2))
    next(batches)
    return batches


def test_a_batch_that_a_dead_worker_left_behind_is_known_as_such(watcher: SignalWatcher) -> None:
    """The batch is in the queue, but its memory has to be asked for, and nobody answers."""
    batches = begun(Vanishing())
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(1.0)
    with pytest.raises((EOFError, OSError)) as caught:
        list(batches)
    assert watcher.has_ended_workers(caught.value)
    assert not SignalWatcher().has_ended_workers(caught.value), "no signal came"


def test_a_worker_that_is_gone_is_known_as_such(watcher: SignalWatcher) -> None:
    batches = begun(Numbers())
    os.kill(os.getpid(), signal.SIGUSR1)
    # What is in the queue is used up first: a worker that ends by itself sends it whole.
    batches._workers[0].kill()
    batches._workers[0].join()
    while not batches._data_queue.empty():
        batches._data_queue._reader.recv_bytes()
    with pytest.raises(RuntimeError, match="DataLoader worker") as caught:
        next(batches)
    assert watcher.has_ended_workers(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("shape"), FileNotFoundError("image"), EOFError(), ValueError("label")])
def test_what_a_dataset_raises_in_a_worker_is_its_own_affair(watcher: SignalWatcher, error: Exception) -> None:
    batches = begun(Numbers(error))
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(type(error)) as caught:
        list(batches)
    assert not watcher.has_ended_workers(caught.value)


def test_training_is_ended_once_and_signals_after_that_break_off_nothing(watcher: SignalWatcher) -> None:
    with pytest.raises(Preempted):
        watcher.end_training(Preempted(75))
    os.kill(os.getpid(), signal.SIGUSR1)
    assert watcher.received == {signal.SIGUSR1}


@pytest.mark.parametrize(("is_leaving", "is_back"), [(False, True), (True, False)])
def test_who_leaves_is_not_told_of_dead_workers_any_more(is_leaving: bool, is_back: bool) -> None:
    def of_torch(*_: object) -> None:
        raise AssertionError("a worker has died")

    before = signal.signal(signal.SIGCHLD, of_torch)
    try:
        watcher = SignalWatcher()
        watcher.install({signal.SIGUSR1: signal.SIG_DFL})
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
        watcher.uninstall(is_leaving=is_leaving)
        assert (signal.getsignal(signal.SIGCHLD) is of_torch) == is_back
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_signal_while_everything_is_let_go_of_changes_nothing(tmp_path: Path) -> None:
    script = f"""
        import os, signal, torch
        from spot_core.checkpointing import Checkpointer
        from spot_core.config import SpotConfig
        from spot_core.errors import Preempted
        from spot_core.handover import Capture
        from spot_core.opening import open_session
        from spot_core.snapshot.files import SafetensorsFile
        from spot_core.store.identity import RunIdentity

        def capture():
            file = SafetensorsFile(path="step-1/model.safetensors", tensors={{"state": torch.zeros(10)}})
            return Capture(step=1, epoch=1.0, native="step-1", max_steps=2, files=[file])

        close = Checkpointer.close

        def interrupted(self):
            os.kill(os.getpid(), signal.SIGTERM)
            close(self)
            os.kill(os.getpid(), signal.SIGTERM)

        Checkpointer.close = interrupted
        options = {{"remote": {str(tmp_path / "remote/run")!r}, "local": {str(tmp_path / "local")!r}, "grace_s": 60.0}}
        config = SpotConfig.resolve(options, fallback_local=".")
        session = open_session(config, RunIdentity("testing", {{}}), device=torch.device("cpu"))
        session.begin()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            session.step_completed(1)
            session.at_boundary(capture)
        except Preempted as error:
            session.close(error)
            raise
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 75, result.stderr
    assert "preempted: step 1 is durable on the remote" in result.stderr
