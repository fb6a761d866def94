"""Host buffers: allocated once, reused by every snapshot, pinned where there is an accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import numpy.typing
import psutil
import torch

from spot_core.snapshot.files import Image, Layout, TensorFile
from spot_core.snapshot.trees import byte_count

_ALIGNMENT = 64
# Kept free for the trainer itself when deciding whether a snapshot fits in host memory.
_HEADROOM_BYTES = 1 << 30


class HostBuffers:
    """One arena of host memory with files as they will lie on the disk. Not thread-safe: one snapshot in flight."""

    def __init__(self, *, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._kinds: list[Any] = []
        self._images: list[Image] = []
        self._bytes = 0

    def like(self, files: Sequence[TensorFile], tensors: Sequence[Sequence[torch.Tensor]]) -> list[Image]:
        """Images to copy these tensors of each file into, those of the last call if nothing but values has changed.

        Raises MemoryError if they would not leave room for the trainer.
        """
        kinds = [file.kind(each) for file, each in zip(files, tensors, strict=True)]
        if kinds != self._kinds:
            self._allocate([file.layout(each) for file, each in zip(files, tensors, strict=True)], tensors)
            self._kinds = kinds
        return self._images

    def _allocate(self, layouts: Sequence[Layout], tensors: Sequence[Sequence[torch.Tensor]]) -> None:
        sizes = [_size(layout, each) for layout, each in zip(layouts, tensors, strict=True)]
        total = sum(map(_aligned, sizes))
        needed = total - self._bytes
        self._images, self._kinds, self._bytes = [], [], 0
        if needed + _HEADROOM_BYTES > available_bytes():
            raise MemoryError(
                f"a snapshot needs {total / 1e9:.1f} GB of host memory, {available_bytes() / 1e9:.1f} GB are free"
            )
        arena = torch.empty(total, dtype=torch.uint8, pin_memory=self._is_pinned).numpy()
        start = 0
        for layout, each, size in zip(layouts, tensors, sizes, strict=True):
            self._images.append(_image(layout, each, arena[start : start + size]))
            start += _aligned(size)
        self._bytes = total


def _size(layout: Layout, tensors: Sequence[torch.Tensor]) -> int:
    return sum(map(len, layout.before)) + sum(map(byte_count, tensors))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _image(layout: Layout, tensors: Sequence[torch.Tensor], memory: numpy.typing.NDArray[numpy.uint8]) -> Image:
    placed, position = [], 0
    for before, tensor in zip(layout.before, tensors, strict=True):
        memory[position : position + len(before)] = numpy.frombuffer(before, numpy.uint8)
        position += len(before)
        end = position + byte_count(tensor)
        # Through numpy each slice gets a storage of its own, as every tensor that torch.save wrote has.
        placed.append(torch.from_numpy(memory[position:end]).view(tensor.dtype).view(tensor.shape))
        position = end
    return Image(layout, memory.data, placed)


def available_bytes() -> int:
    """Host memory that can still be used, within the container's limit if there is one."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return free if limit == "max" else min(free, max(0, int(limit) - used))
    except (OSError, ValueError):
        return free
