"""Taking a snapshot: small state at once, large tensors overlapped with the next forward and backward.

Parameters and optimizer state change only in the optimizer step. `Snapshotter.take` returns after the volatile
part is safe; a worker thread (CPU) or a side stream (CUDA) copies the rest, and `gate`, called before the next
optimizer step, waits for what is left. That wait plus `take` is the stall.
Threads: `take` and `gate` on the training thread; the copy on a thread of its own; the files are the writer's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain

import torch

from spot_core.errors import ChangedStateError
from spot_core.snapshot.buffers import HostBuffers
from spot_core.snapshot.files import BytesFile, NativeFile, SafetensorsFile, TorchFile
from spot_core.snapshot.trees import rebuild

logger = logging.getLogger(__name__)

# How long the copy waits for the training thread to be in its next step. Before it lets go of the interpreter it has
# thousands of tensors to name: beside a forward pass that costs nothing, between two steps training waits for it.
_HOLD_S = 0.005


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Files whose tensors are, once `ready` is done, a consistent copy in host memory.

    ready: resolves to the same files with host tensors in place of the live ones, or to the copy's error.
    written: set by the writer once the files are written or given up.
    """

    ready: Future[list[NativeFile]]
    written: threading.Event


class Snapshotter:
    """Copies live state into reused host buffers, one snapshot at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        is_cuda = device.type == "cuda"
        self._buffers = HostBuffers(is_pinned=is_cuda)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="spot-copy")
        self._stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]
        self._pending: Snapshot | None = None
        self._held: list[torch.Tensor] = []
        self._copied: torch.cuda.Event | None = None
        self._is_buffered = True
        self._moves = threading.Event()

    def take(self, files: Sequence[NativeFile], is_current: Callable[[], bool] | None = None) -> Snapshot:
        """Start copying `files`; the previous snapshot must have been written. Returns within the volatile copy.

        is_current: asked before the copy; if `files` turn out not to be what they should, nothing is copied.
        """
        fixed = [_freeze(file) for file in files]
        ordered: torch.cuda.Event | None = None
        if self._stream is not None:
            # The side stream must see the optimizer step that the current stream still has queued.
            ordered = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ordered.record(torch.cuda.current_stream(self._device))
        self._moves.clear()
        self._pending = Snapshot(self._pool.submit(self._copy, fixed, ordered, is_current), threading.Event())
        return self._pending

    def moves(self) -> None:
        """The training thread is in its next step: the copy need not wait for that any longer."""
        if self._pending is not None:
            self._moves.set()

    def gate(self) -> float:
        """Wait until the optimizer may change what is being copied; returns the seconds waited."""
        self.moves()
        pending, self._pending = self._pending, None
        if pending is None:
            return 0.0
        began = time.perf_counter()
        pending.ready.exception()  # waits; the writer reports an error
        if not self._is_buffered:
            pending.written.wait()  # too little host memory: the writer reads the live tensors
        elif self._copied is not None:
            # The device waits, not this thread: the next optimizer kernels queue behind the copy.
            torch.cuda.current_stream(self._device).wait_event(self._copied)
        return time.perf_counter() - began

    def wait_for_device(self) -> None:
        """Block the calling (writer) thread until the device has finished the copy."""
        if self._copied is not None:
            self._copied.synchronize()

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    @torch.no_grad()
    def _copy(
        self, files: list[NativeFile], ordered: torch.cuda.Event | None, is_current: Callable[[], bool] | None
    ) -> list[NativeFile]:
        self._moves.wait(_HOLD_S)
        if is_current is not None and not is_current():
            raise ChangedStateError(
                "the model was changed otherwise than by training: a callback or a hook froze or exchanged a part of it"
            )
        described = [file for file in files if not isinstance(file, BytesFile)]
        tensors = [file.ordered() for file in described]
        # Held until the next snapshot: freed while the side stream still reads it, memory would be handed out again.
        self._held = live = list(chain.from_iterable(tensors))
        if not self._is_buffered:
            return files
        try:
            images = self._buffers.like(described, tensors)
        except MemoryError as error:
            logger.warning("%s: from now on checkpoints are streamed while training waits", error)
            self._is_buffered = False
            return files
        host = [tensor for image in images for tensor in image.tensors]
        if self._stream is not None and ordered is not None:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(ordered)
                _copy_all(host, live, is_async=True)
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record(self._stream)
            self._copied = copied
        else:
            _copy_all(host, live, is_async=False)
        supply = iter(images)
        return [file if isinstance(file, BytesFile) else file.on_host(next(supply)) for file in files]


def _freeze(file: NativeFile) -> NativeFile:
    """Copy what may change before the next optimizer step: containers, plain values, volatile tensors."""
    if isinstance(file, TorchFile):

        def leaf(live: torch.Tensor) -> torch.Tensor:
            return _clone(live) if file.is_volatile(live) else live

        if file.stable_keys and type(file.tree) is dict:
            # Thousands of small dicts in an optimizer's state: copying them here would be most of the stall.
            stable = file.stable_keys
            tree = {key: part if key in stable else rebuild(part, leaf) for key, part in file.tree.items()}
            return replace(file, tree=tree)
        return replace(file, tree=rebuild(file.tree, leaf))
    if isinstance(file, SafetensorsFile) and file.volatile:
        tensors = {key: _clone(tensor) if key in file.volatile else tensor for key, tensor in file.tensors.items()}
        return replace(file, tensors=tensors)
    return file


def _copy_all(host: list[torch.Tensor], live: list[torch.Tensor], *, is_async: bool) -> None:
    """Copy each live tensor into its host tensor. is_async: may return once the copies are queued on the stream."""
    # One call lets go of the GIL once. A loop would compete for it at every tensor (an adapter with its Adam state has
    # some 1,800) with a training thread that is busy in Python.
    if live:
        torch._foreach_copy_(host, live, non_blocking=is_async)


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


def device_name(device: torch.device) -> str:
    """What a checkpoint's manifest calls it: another device computes other bits."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
