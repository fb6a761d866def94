"""This project behind the same calls: the product as users run it, and the core alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stall_savers import Saver, Training
from stall_states import manifest_of

from spot_core.cadence.cadence import Cadence
from spot_core.data.position import DataPosition
from spot_core.snapshot.capture import Snapshotter
from spot_core.snapshot.files import NativeFile, SafetensorsFile, TorchFile
from spot_core.snapshot.writer import CheckpointWriter, Written
from spot_core.store import catalog
from spot_core.store.manifest import Manifest
from spot_core.store.posix import PosixTier

_SETTLE_TIMEOUT_S = 300.0


class SpotHooks:
    """The product's callback under measurement: the time spent in its hooks, and when a checkpoint is due.

    The cadence goes on deciding at every boundary, as it does for users.
    """

    def __init__(self, remote: Path) -> None:
        self._remote = PosixTier(remote)
        self._cadence: Cadence | None = None
        self.held_s = 0.0

    def training_begins(self, cadence: Cadence, positions: list[DataPosition]) -> None:
        """positions: of the loaders; recording the random state before each batch is no hook, but ours."""
        self._cadence = cadence
        self.hold_off()
        for position in positions:
            position._batch_begins = self.timed(position._batch_begins)  # type: ignore[method-assign]

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, with the time that it takes added to `held_s`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.held_s += time.perf_counter() - began

        return timed

    def demand(self) -> None:
        """Have the next boundary find a checkpoint due."""
        assert self._cadence is not None
        self._cadence.taken(-math.inf)

    def hold_off(self) -> None:
        """Have every boundary find nothing due."""
        assert self._cadence is not None
        self._cadence.taken(math.inf)

    def durable(self, step: int) -> Manifest | None:
        """The manifest of the checkpoint taken at `step`, once it is on the remote."""
        for name in catalog.names(self._remote):
            if name.step == step:
                return catalog.read_manifest(self._remote, name)
        return None

    def newest_bytes(self) -> int:
        """Size of the newest checkpoint on the remote."""
        return catalog.read_manifest(self._remote, catalog.names(self._remote)[0]).total_bytes


class SpotSaver(Saver):
    """The product as users run it: its hooks act after `start`, the agent drains to a second folder."""

    name = "SpotCallback"

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        self._hooks = training.spot
        self._before_s = 0.0
        self._step = 0

    def start(self) -> None:
        self._before_s, self._step = self._hooks.held_s, self.training.step()
        self._hooks.demand()

    def settle(self) -> None:
        self.elsewhere_s = self._hooks.held_s - self._before_s
        self._hooks.hold_off()
        deadline = time.monotonic() + _SETTLE_TIMEOUT_S
        while (manifest := self._hooks.durable(self._step)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the checkpoint of step {self._step} did not become durable")
            time.sleep(0.02)
        self.file_bytes = manifest.total_bytes


class SpotIdle(SpotSaver):
    """What the product costs in a step without a checkpoint."""

    name = "SpotCallback, no checkpoint"

    def start(self) -> None:
        self._before_s = self._hooks.held_s

    def settle(self) -> None:
        self.elsewhere_s = self._hooks.held_s - self._before_s


class CoreSaver(Saver):
    """The core alone: snapshot, gate, writer, commit on the local tier."""

    name = "spot_core"

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        self._tier = PosixTier(self.folder)
        self._snapshotter = Snapshotter(torch.device("cpu"))
        self._writer = CheckpointWriter(self._tier, self._snapshotter, number=1)
        self._written: Written | None = None

    def start(self) -> None:
        state = self.state()
        files: list[NativeFile] = [
            SafetensorsFile(path="checkpoint/model.safetensors", tensors=state["model"]),
            TorchFile(path="checkpoint/optimizer.pt", tree=state["optimizer"], stable_keys=frozenset({"state"})),
        ]
        self._writer.submit(self._snapshotter.take(files), manifest_of(self.training.step()), self._done)

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
