"""What `stall.py` compares this project with under any trainer, and the calls that every way to checkpoint has.

Each stores the trained tensors and the optimizer's state of a live training. `memcpy` stores nothing: it is how long
the bytes alone take when nothing overlaps.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save

from spot_core.snapshot.trees import tensors_of

if TYPE_CHECKING:
    from stall_spot import SpotHooks


@dataclass(frozen=True, slots=True)
class Training:
    """A live training. step: how many optimizer steps were made. spot: this project's callback in it."""

    trainer: Any
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    spot: SpotHooks
    step: Callable[[], int]


class Saver:
    """One way to checkpoint a live training. `start` and `gate` are timed: they hold up the training thread.

    elsewhere_s: seconds for which the last checkpoint held the training thread outside of both.
    file_bytes: size of the last checkpoint's files.
    """

    name = ""
    elsewhere_s = 0.0
    file_bytes = 0

    def __init__(self, training: Training, folder: Path) -> None:
        self.training, self.folder = training, folder / type(self).__name__
        named = training.model.named_parameters()  # a walk of milliseconds, the same at every checkpoint
        self._trained = {name: parameter.detach() for name, parameter in named if parameter.requires_grad}

    def start(self) -> None:
        """After an optimizer step."""
        raise NotImplementedError

    def gate(self) -> None:
        """Before the next optimizer step."""

    def settle(self) -> None:
        """Wait for what runs in the background and delete what was written; not timed."""
        self.file_bytes = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Training is over."""

    def state(self) -> dict[str, Any]:
        """The live state to store: what the optimizer changes."""
        return {"model": self._trained, "optimizer": self.training.optimizer.state_dict()}


class DcpSaver(Saver):
    """`torch.distributed.checkpoint.async_save` as documented: new staging buffers at each call."""

    name = "DCP async_save"
    stager: DefaultStager | None = None

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        self._saved: Callable[[], object] | None = None

    def start(self) -> None:
        future = async_save(self.state(), checkpoint_id=self.folder, async_stager=self.stager)
        assert isinstance(future, Future)  # anything else comes from stagers that copy in the background
        self._saved = future.result

    def settle(self) -> None:
        assert self._saved is not None
        self._saved()
        super().settle()


class DcpReusingSaver(DcpSaver):
    """The same with a stager of the caller's, which keeps its buffers between calls."""

    name = "DCP async_save, stager reused"

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        self.stager = DefaultStager(StagingOptions(False, False, False, False))

    def close(self) -> None:
        assert self.stager is not None
        self.stager.close()


class TorchSaver(Saver):
    """`torch.save` of the state into one file, and fsync."""

    name = "torch.save, fsync"

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "state.pt", "wb") as file:
            torch.save(self.state(), file)
            file.flush()
            os.fsync(file.fileno())


class CopySaver(Saver):
    """The bytes into host memory that was allocated and touched before: the physical limit without overlap."""

    name = "memcpy"

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        self._live = tensors_of(self.state())
        self._host = [torch.zeros_like(tensor) for tensor in self._live]

    @torch.no_grad()
    def start(self) -> None:
        for target, source in zip(self._host, self._live, strict=True):
            target.copy_(source)
