"""Files that are digested, and on their way to the disk, while they are written.

What is saved is written in one thread, beside a training that wants the GIL: each handing over would wait for it, which
costs more than it saves. For the same reason it goes by megabytes, small pieces gathered. Writing back begins at once,
and all files of a checkpoint are written before the first is fsynced: then little is left to wait for.
What is restored comes in parts, each written where it belongs by the thread that fetched it.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from spot_core.store.manifest import FileRecord
from spot_core.store.posix import write_all
from spot_core.store.tier import BLOCK_BYTES

_GATHERED_BYTES = 1 << 20
_CHUNK_BYTES = 8 << 20
_SYNC_FILE_RANGE_WRITE = 2


def _find_sync_file_range() -> Callable[..., int] | None:
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux has it
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


_sync_file_range = _find_sync_file_range()


class DigestingFile:
    """A new file that digests what is written to it, closed at the end of its block."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb", buffering=0)
        self._digest = blake3()
        self._buffer = memoryview(bytearray(_GATHERED_BYTES))
        self._gathered = self._written = self._begun = 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        count, end = len(view), self._gathered + len(view)
        if end > _GATHERED_BYTES:
            self._append_gathered()
            end = count
        if end <= _GATHERED_BYTES:
            self._buffer[self._gathered : end] = view
            self._gathered = end
        else:
            for start in range(0, count, _CHUNK_BYTES):
                self._append(view[start : start + _CHUNK_BYTES])

    def flush(self) -> None:
        """Write what was gathered and have all of it written back."""
        self._append_gathered()
        self._begin(at_least=1)

    def durable(self, path: str) -> FileRecord:
        """Make it durable; returns size and digest under the name `path`."""
        self.flush()
        os.fsync(self._file.fileno())
        return FileRecord(path, self._written, str(self._digest.hexdigest()))

    def __enter__(self) -> DigestingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _append_gathered(self) -> None:
        count, self._gathered = self._gathered, 0
        if count:
            self._append(self._buffer[:count])

    def _append(self, data: memoryview) -> None:
        self._digest.update(data)
        write_all(self._file.fileno(), data)
        self._written += len(data)
        self._begin(at_least=_CHUNK_BYTES)

    def _begin(self, *, at_least: int) -> None:
        count = self._written - self._begun
        if count >= at_least:
            _write_back(self._file.fileno(), self._begun, count)
            self._begun = self._written


class PlacedFile:
    """A file whose parts are written in any order, by several threads, and digested in theirs, as the system has them.

    It is closed when the last of them has let go of it: one that comes late must not meet another file's descriptor.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        weakref.finalize(self, os.close, self._descriptor)
        self._digest = blake3()
        self._digested = 0
        self._buffer = memoryview(bytearray(BLOCK_BYTES))

    def place(self, start: int, data: bytes) -> None:
        """Write a piece where it starts."""
        view, at = memoryview(data), start
        while view:
            count = os.pwrite(self._descriptor, view, at)
            view, at = view[count:], at + count

    def begin(self, start: int, count: int) -> None:
        """Have what was placed there be on its way to the disk."""
        _write_back(self._descriptor, start, count)

    def digest(self, count: int) -> None:
        """Digest the next `count` bytes, which have been placed."""
        end = self._digested + count
        while self._digested < end:
            read = os.preadv(self._descriptor, [self._buffer[: end - self._digested]], self._digested)
            if read == 0:
                break
            self._digest.update(self._buffer[:read])
            self._digested += read

    def durable(self, path: str) -> FileRecord:
        """Make it durable; returns size and digest under the name `path`."""
        os.fsync(self._descriptor)
        return FileRecord(path, self._digested, str(self._digest.hexdigest()))


def _write_back(descriptor: int, start: int, count: int) -> None:
    """Only a hint: what it does not begin the fsync does, which also tells what failed."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, start, count, _SYNC_FILE_RANGE_WRITE)
