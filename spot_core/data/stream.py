"""Data position of a DataLoader over a stream: how many batches were taken, and the state its workers started from.

A stream has no indices to skip by, so on resume it is read again. The random state at the moment the loader makes its
iterator is remembered and set again: workers get the same seeds, and draw what they drew. The rest is the stream's
own: it must come in the same order each time it is read.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from spot_core.data.position import DataState
from spot_core.snapshot import rng
from spot_core.snapshot.rng import RngState

logger = logging.getLogger(__name__)


class StreamPosition:
    """Tracks one loader over an IterableDataset."""

    def __init__(self) -> None:
        self._start: RngState | None = None
        self._resume: DataState | None = None

    def track(self, loader: DataLoader[Any]) -> None:
        """Be there when `loader` makes an iterator: its only moment that can be reached from outside."""
        make, reference = type(loader)._get_iterator, weakref.ref(loader)  # no cycle: workers end with their loader
        # DataLoader.__iter__ looks it up on the instance.
        loader._get_iterator = lambda: self._iterator(lambda: make(reference()))  # type: ignore

    def epoch_ends(self) -> None:
        """Until the next iterator is made there is no position."""
        self._start = None

    def state(self, consumed: int, step: RngState) -> DataState:
        """The position after `consumed` batches of this iterator."""
        return DataState(batches=consumed, epoch_start=self._start, ahead=(), step=step)

    def resume(self, state: DataState) -> None:
        """Arm the next iterator."""
        self._resume = state

    def _iterator(self, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        resume, self._resume = self._resume, None
        now = self._start = rng.capture(with_devices=False)
        if resume is None or resume.epoch_start is None:
            return make()
        self._start = resume.epoch_start
        rng.restore(resume.epoch_start)
        iterator = make()
        if resume.batches:
            logger.info("reading %d batches of the stream again", resume.batches)
        for _ in range(resume.batches):
            next(iterator, None)
        rng.restore(now)
        return iterator
