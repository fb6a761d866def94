"""The writer: turns a snapshot into native files on the local tier and commits them. One thread, one at a time.

Each byte is digested while it is hot, on its way to the file. A failure never reaches the training thread as an
exception: it is logged once per cause, counted and reported through `on_done`; the next checkpoint tries again.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from blake3 import blake3

from spot_core.errors import FencedError
from spot_core.snapshot.capture import Snapshot, Snapshotter
from spot_core.snapshot.files import (
    NativeFile,
    SafetensorsFile,
    TorchFile,
    safetensors_order,
    same_bits,
    write_safetensors,
)
from spot_core.store import incarnation
from spot_core.store.manifest import FileRecord, Manifest
from spot_core.store.posix import PosixTier, write_all

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Written:
    """Outcome of one checkpoint: its manifest and seconds taken, or the error that prevented it."""

    manifest: Manifest
    seconds: float
    error: Exception | None = None


class CheckpointWriter:
    """Commits snapshots of one incarnation to the local tier."""

    def __init__(self, tier: PosixTier, snapshotter: Snapshotter, *, number: int) -> None:
        self._tier, self._snapshotter, self._number = tier, snapshotter, number
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="spot-writer")
        self._current: Future[None] | None = None
        self._is_first = True
        self._reported: str | None = None
        self.failures = 0

    @property
    def is_busy(self) -> bool:
        """Whether a snapshot is still being written: its host buffers are in use."""
        return self._current is not None and not self._current.done()

    def submit(self, snapshot: Snapshot, manifest: Manifest, on_done: Callable[[Written], None]) -> None:
        """Write and commit in the background. manifest: complete but for its files."""
        self._current = self._pool.submit(self._write, snapshot, manifest, on_done)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the snapshot being written; returns whether it is."""
        if self._current is None:
            return True
        if not wait([self._current], timeout_s).done:
            return False
        self._current.result()
        return True

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _write(self, snapshot: Snapshot, manifest: Manifest, on_done: Callable[[Written], None]) -> None:
        began = time.perf_counter()
        staged: Path | None = None
        try:
            files = snapshot.ready.result()
            self._snapshotter.wait_for_device()
            staged = self._tier.stage(manifest.name)
            manifest = replace(manifest, files=tuple(self._write_file(staged, file) for file in files))
            if self._is_first:
                _load_back(staged, files)
                self._is_first = False
            incarnation.check_fence(self._tier, self._number)
            self._tier.commit(staged, manifest)
            self._reported = None
            written = Written(manifest, time.perf_counter() - began)
        except Exception as error:
            written = Written(manifest, time.perf_counter() - began, error)
            self._failed(error, manifest, staged)
        finally:
            snapshot.written.set()
        on_done(written)

    def _failed(self, error: Exception, manifest: Manifest, staged: Path | None) -> None:
        self.failures += 1
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)
        if isinstance(error, FencedError):
            return  # stops the training thread, with its own message
        cause = f"{type(error).__name__} {getattr(error, 'errno', '')}"
        if cause != self._reported:
            self._reported = cause
            logger.error(
                "checkpoint of step %d not written (%s: %s); training goes on, earlier checkpoints are intact, "
                "the next one is tried as usual",
                manifest.step,
                type(error).__name__,
                error,
            )

    def _write_file(self, staged: Path, file: NativeFile) -> FileRecord:
        path = staged / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with DigestingFile(path) as target:
            if isinstance(file, SafetensorsFile):
                ordered = {key: file.tensors[key] for key in safetensors_order(file.tensors)}
                write_safetensors(target, ordered, file.metadata)  # type: ignore[arg-type]
            elif isinstance(file, TorchFile):
                torch.save(file.tree, target)  # type: ignore[arg-type]
            else:
                target.write(file.content())
        return FileRecord(file.path, target.size, target.hexdigest())


class DigestingFile:
    """A new file that digests what is written to it and is fsynced when closed without an error."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb", buffering=0)
        self._digest = blake3()
        self.size = 0

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK_BYTES):
            chunk = view[start : start + _CHUNK_BYTES]
            self._digest.update(chunk)
            write_all(self._file.fileno(), chunk)
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is buffered."""

    def hexdigest(self) -> str:
        return str(self._digest.hexdigest())

    def __enter__(self) -> DigestingFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            os.fsync(self._file.fileno())
        self._file.close()


def _load_back(staged: Path, files: list[NativeFile]) -> None:
    """Load the first checkpoint of a life as a resume would, and compare: a state that cannot be restored must be
    known in the first minute, not after the first kill."""
    from safetensors import safe_open

    for file in files:
        path = staged / file.path
        if isinstance(file, TorchFile):
            with _restorable_globals():
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        elif isinstance(file, SafetensorsFile):
            with safe_open(path, framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118
                    if not same_bits(stored.get_tensor(key), file.tensors[key]):
                        raise ValueError(f"{file.path}: tensor {key} does not read back as it was captured")


def _restorable_globals() -> torch.serialization.safe_globals:
    """What trainers allow beside tensors: numpy's arrays, in random states."""
    import numpy as np

    core = np._core if hasattr(np, "_core") else np.core  # renamed in numpy 2
    return torch.serialization.safe_globals(
        [core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    )
