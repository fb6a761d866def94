"""How the savers take turns in one training, whatever the trainer: its hooks call the methods here.

A turn is one save, the step it overlaps with and one undisturbed step. The order rotates, and the first round, in
which buffers are allocated, is not counted. Before the next turn everything in the background is waited for.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from stall_savers import Saver, Training

from spot_core.snapshot.trees import tensors_of


class Turns:
    """Lets the savers take turns and keeps what was measured.

    stalls, slowdowns: by saver, in seconds, and next step over the undisturbed one before. undisturbed: seconds of
    forward and backward. file_bytes: by saver, of its last checkpoint. tensors: the state that is to be stored.
    """

    def __init__(self, kinds: Sequence[type[Saver]], folder: Path, *, repeat: int) -> None:
        self._kinds, self._folder, self._repeat = kinds, folder, repeat
        self._savers: list[Saver] = []
        self._turns: list[tuple[Saver, bool]] = []
        self._current: tuple[Saver, bool] | None = None
        self._held_s = self._began = self._forward_s = 0.0
        self.stalls: dict[str, list[float]] = defaultdict(list)
        self.slowdowns: dict[str, list[float]] = defaultdict(list)
        self.file_bytes: dict[str, int] = {}
        self.undisturbed: list[float] = []
        self.tensors: list[torch.Tensor] = []

    @property
    def steps(self) -> int:
        """Two for each turn, one before the first and one after the last, which the callback ends in its own way."""
        return 2 * len(self._kinds) * (self._repeat + 1) + 2

    def step_begins(self) -> None:
        """The batch is there; forward comes next."""
        self._began = time.perf_counter()

    def backward_ended(self) -> None:
        """The optimizer step comes next."""
        self._forward_s = time.perf_counter() - self._began
        if self._current is not None:
            self._hold(self._current[0].gate)

    def step_ended(self, training: Callable[[], Training]) -> None:
        """The optimizer step is done. training: asked for once, when the optimizer has state."""
        if not self._savers:
            self._open(training())
        if self._current is not None:
            self._record(*self._current)
            self._current = None
            return
        self.undisturbed.append(self._forward_s)
        if self._turns:
            self._current = self._turns.pop(0)
            self._held_s = 0.0
            self._hold(self._current[0].start)

    def training_ended(self) -> None:
        for saver in self._savers:
            saver.close()

    def _open(self, training: Training) -> None:
        savers = [kind(training, self._folder) for kind in self._kinds]
        for round_ in range(self._repeat + 1):
            first = round_ % len(savers)
            self._turns += [(saver, round_ > 0) for saver in savers[first:] + savers[:first]]
        self.tensors = tensors_of(savers[0].state())
        self._savers = savers

    def _hold(self, call: Callable[[], None]) -> None:
        began = time.perf_counter()
        call()
        self._held_s += time.perf_counter() - began

    def _record(self, saver: Saver, is_counted: bool) -> None:
        saver.settle()
        self.file_bytes[saver.name] = saver.file_bytes
        if is_counted:
            self.stalls[saver.name].append(self._held_s + saver.elsewhere_s)
            self.slowdowns[saver.name].append(self._forward_s / self.undisturbed[-1])
