"""The course of one training in `steady.py`, whatever the trainer: called back after each of its steps.

First checkpoints back to back, each waited for until it is on the remote: what training and agent hold in memory then.
After that segments of some seconds with one checkpoint each, taken as they begin, and segments without, in turn.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
from stall_spot import SpotHooks

_DURABLE_S = 300.0
_POLL_S = 0.02
_WARM_UP = 3


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes of the training and of its agent."""

    trainer: int
    agent: int


class Course:
    """Has checkpoints taken and keeps what was measured.

    memory: after each save. peaks: the most while one was on its way. rates: steps a second of each turn, with a
    checkpoint and without. late: checkpoints that were not durable when their segment ended.
    """

    def __init__(self, hooks: SpotHooks, *, saves: int, seconds: float, repeat: int) -> None:
        self._hooks, self._saves, self._seconds, self._repeat = hooks, saves, seconds, repeat
        self._step = 0
        self._course = self._run()
        self.memory: list[Memory] = []
        self.peaks: list[Memory] = []
        self.rates: list[tuple[float, float]] = []
        self.late = 0

    def step_ended(self) -> bool:
        """A step is done; returns whether it was the last one."""
        self._step += 1
        return next(self._course, True) is True

    def _run(self) -> Iterator[None]:
        for _ in range(_WARM_UP):
            yield
        processes = _processes()
        for _ in range(self._saves):
            taken = self._step
            self._hooks.demand()
            yield
            self._hooks.hold_off()
            self.peaks.append(self._wait_durable(taken, processes))
            self.memory.append(_memory(processes))
        for turn in range(self._repeat):
            rates = {}
            for is_saved in (turn % 2 == 0, turn % 2 == 1):
                yield  # what was waited for is not part of a segment
                rates[is_saved] = yield from self._segment(is_saved=is_saved)
            self.rates.append((rates[True], rates[False]))

    def _segment(self, *, is_saved: bool) -> Iterator[None]:
        """Steps a second, from the end of one step to the end of another."""
        began, taken = time.perf_counter(), self._step
        if is_saved:
            self._hooks.demand()
        while (elapsed_s := time.perf_counter() - began) < self._seconds:
            yield
            self._hooks.hold_off()
        if is_saved and self._hooks.durable(taken) is None:
            self.late += 1
            self._wait_durable(taken, _processes())
        return (self._step - taken) / elapsed_s

    def _wait_durable(self, step: int, processes: tuple[psutil.Process, psutil.Process]) -> Memory:
        """Until the checkpoint is on the remote; the most memory meanwhile."""
        deadline = time.monotonic() + _DURABLE_S
        most = _memory(processes)
        while self._hooks.durable(step) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the checkpoint of step {step} did not become durable")
            time.sleep(_POLL_S)
            now = _memory(processes)
            most = Memory(max(most.trainer, now.trainer), max(most.agent, now.agent))
        return most


def _processes() -> tuple[psutil.Process, psutil.Process]:
    trainer = psutil.Process()
    [agent] = (each for each in trainer.children() if "spot_core.agent" in each.cmdline())
    return trainer, agent


def _memory(processes: tuple[psutil.Process, psutil.Process]) -> Memory:
    trainer, agent = processes
    return Memory(trainer.memory_info().rss, agent.memory_info().rss)
