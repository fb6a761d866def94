"""Notices datasets that draw random numbers in worker processes: a resume does not bring those back.

The generators of workers cannot be set from outside, and skipping by index draws nothing in them. So the collate
function, which runs in the worker after the items were read, looks whether the generators moved, and says so through
shared memory. It draws nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import get_worker_info

from spot_core.snapshot import rng
from spot_core.snapshot.rng import RngState

NOTE = "the data draws random numbers in worker processes, which start them anew"


class WorkerDraws:
    """One flag for all workers of the loaders given to `watch`."""

    def __init__(self) -> None:
        self._flag: torch.Tensor = torch.zeros(1, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]

    @property
    def is_seen(self) -> bool:
        """Whether a worker has drawn so far."""
        return bool(self._flag.item())

    def watch(self, loader: Any) -> None:
        """Before an iterator of `loader` is made."""
        loader = getattr(loader, "base_dataloader", loader)  # inside accelerate's adapter
        collate = getattr(loader, "collate_fn", None)
        if collate is None or not getattr(loader, "num_workers", 0):
            return
        loader.collate_fn = _Watching(collate.inner if isinstance(collate, _Watching) else collate, self._flag)


class _Watching:
    """Stands in for a collate function."""

    def __init__(self, inner: Callable[[Any], Any], flag: torch.Tensor) -> None:
        self.inner, self._flag = inner, flag
        self._before: RngState | None = None

    def __call__(self, items: Any) -> Any:
        batch = self.inner(items)
        if get_worker_info() is not None and not self._flag.item():
            now = rng.capture(with_devices=False)
            if self._before is None:
                fresh = torch.Generator().manual_seed(torch.initial_seed()).get_state()
                is_moved = not torch.equal(fresh, now.torch_cpu)
            else:
                is_moved = not rng.is_same(self._before, now)
            self._before = now
            if is_moved:
                self._flag.fill_(1)
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)
