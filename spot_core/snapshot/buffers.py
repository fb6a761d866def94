"""Host buffers: allocated once, reused by every snapshot, pinned where there is an accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import psutil
import torch

_ALIGNMENT = 64
_LAYOUT = attrgetter("dtype", "shape")
# Kept free for the trainer itself when deciding whether a snapshot fits in host memory.
_HEADROOM_BYTES = 1 << 30


class HostBuffers:
    """One arena of host memory, cut into tensors that own their slice. Not thread-safe: one snapshot in flight."""

    def __init__(self, *, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._layout: list[tuple[torch.dtype, torch.Size]] = []
        self._views: list[torch.Tensor] = []

    @property
    def bytes(self) -> int:
        return sum(view.numel() * view.dtype.itemsize for view in self._views)

    def like(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Uninitialised host tensors of the same shapes and dtypes, those of the last call if nothing changed.

        Raises MemoryError if they would not leave room for the trainer.
        """
        layout = list(map(_LAYOUT, tensors))
        if layout != self._layout:
            self._allocate(tensors)
            self._layout = layout
        return self._views

    def _allocate(self, tensors: Sequence[torch.Tensor]) -> None:
        offsets, total = [], 0
        for tensor in tensors:
            offsets.append(total)
            total += -(-tensor.numel() * tensor.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        needed = total - self.bytes
        self._views, self._layout = [], []
        if needed + _HEADROOM_BYTES > available_bytes():
            raise MemoryError(
                f"a snapshot needs {total / 1e9:.1f} GB of host memory, {available_bytes() / 1e9:.1f} GB are free"
            )
        arena = torch.empty(total, dtype=torch.uint8, pin_memory=self._is_pinned).numpy()
        for tensor, offset in zip(tensors, offsets, strict=True):
            size = tensor.numel() * tensor.dtype.itemsize
            # Through numpy each slice gets a storage of its own: torch.save writes whole storages.
            view = torch.from_numpy(arena[offset : offset + size]).view(tensor.dtype)
            self._views.append(view.view(tensor.shape))


def available_bytes() -> int:
    """Host memory that can still be used, within the container's limit if there is one."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return free if limit == "max" else min(free, max(0, int(limit) - used))
    except (OSError, ValueError):
        return free
