"""This project behind the same calls: the product as users run it, and the core alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stall_savers import Saver
from transformers import Trainer

from hf_spot import SpotCallback
from spot_core.snapshot.capture import Snapshotter
from spot_core.snapshot.files import NativeFile, SafetensorsFile, TorchFile
from spot_core.snapshot.writer import CheckpointWriter, Written
from spot_core.store import layout
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.posix import PosixTier

_SETTLE_TIMEOUT_S = 300.0


class MeasuredSpotCallback(SpotCallback):
    """The product's callback, which takes a checkpoint when told, and adds up the time spent in its hooks."""

    def __init__(self, remote: Path, local: Path) -> None:
        super().__init__(str(remote), local=str(local))
        self.manifests = PosixTier(remote)
        self.held_s = 0.0
        self.is_wanted = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_begin(*args, **kwargs)
        self._hold_off()
        # Not a hook, but ours: the random state recorded before each batch.
        self._data._batch_begins = self._timed(self._data._batch_begins)  # type: ignore[method-assign]

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._timed(super().on_step_begin)(*args, **kwargs)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._timed(super().on_pre_optimizer_step)(*args, **kwargs)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._timed(super().on_step_end)(*args, **kwargs)

    def _boundary(self, state: Any) -> None:
        # A new best model is what makes the session take a checkpoint that is not due.
        self._has_new_best, self.is_wanted = self.is_wanted, False
        super()._boundary(state)
        self._hold_off()

    def _hold_off(self) -> None:
        """The cadence goes on deciding at every step, as it does for users, and always finds nothing due."""
        assert self._session is not None
        self._session._cadence.taken(math.inf)

    def _timed(self, call: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any, **kwargs: Any) -> None:
            began = time.perf_counter()
            call(*args, **kwargs)
            self.held_s += time.perf_counter() - began

        return timed


class SpotSaver(Saver):
    """The product as users run it: its hooks act after `start`, the agent drains to a second folder."""

    name = "SpotCallback"

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        super().__init__(trainer, folder)
        callbacks = trainer.callback_handler.callbacks
        self._callback = next(found for found in callbacks if isinstance(found, MeasuredSpotCallback))
        self._before_s = 0.0
        self._step = 0

    def start(self) -> None:
        self._before_s, self._step = self._callback.held_s, self.trainer.state.global_step
        self._callback.is_wanted = True

    def settle(self) -> None:
        self.elsewhere_s = self._callback.held_s - self._before_s
        deadline = time.monotonic() + _SETTLE_TIMEOUT_S
        while not any(entry.endswith(f"-{self._step:012d}.json") for entry in self._committed()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the checkpoint of step {self._step} did not become durable")
            time.sleep(0.02)

    def _committed(self) -> list[str]:
        return self._callback.manifests.list(layout.MANIFESTS)


class SpotIdle(SpotSaver):
    """What the product costs in a step without a checkpoint."""

    name = "SpotCallback, no checkpoint"

    def start(self) -> None:
        self._before_s = self._callback.held_s

    def settle(self) -> None:
        self.elsewhere_s = self._callback.held_s - self._before_s


class CoreSaver(Saver):
    """The core alone: snapshot, gate, writer, commit on the local tier."""

    name = "spot_core"

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        super().__init__(trainer, folder)
        self._tier = PosixTier(self.folder)
        self._snapshotter = Snapshotter(torch.device("cpu"))
        self._writer = CheckpointWriter(self._tier, self._snapshotter, number=1)
        self._written: Written | None = None

    def start(self) -> None:
        state = self.state()
        files: list[NativeFile] = [
            SafetensorsFile(path="model.safetensors", tensors=state["model"]),
            TorchFile(path="optimizer.pt", tree=state["optimizer"]),
        ]
        self._writer.submit(self._snapshotter.take(files), self._manifest(), self._done)

    def gate(self) -> None:
        self._snapshotter.gate()

    def settle(self) -> None:
        self._writer.wait()
        assert self._written is not None
        if self._written.error is not None:
            raise self._written.error
        super().settle()

    def close(self) -> None:
        self._writer.close()
        self._snapshotter.close()

    def _done(self, written: Written) -> None:
        self._written = written

    def _manifest(self) -> Manifest:
        return Manifest(
            run="benchmark",
            name=CheckpointName(1, self.trainer.state.global_step),
            epoch=0.0,
            useful_s=0.0,
            created=time.time(),
            framework="transformers",
            native=".",
            files=(),
        )
