"""Files that are digested, and on their way to the disk, while they are written.

Small pieces are gathered, of which a checkpoint of adapters has thousands. Writing back begins at once, and all files
of a checkpoint are written before the first is fsynced: then little is left to wait for. Without further threads: each
handing over would wait for the GIL, which costs more than it saves.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from spot_core.store.manifest import FileRecord
from spot_core.store.posix import write_all

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
    """A file that digests what is written to it, closed at the end of its block. is_new: it must not exist.

    An OSError of a write ends the block as it is: torch.save makes a RuntimeError about positions of it.
    """

    def __init__(self, path: Path, *, is_new: bool = True) -> None:
        self._file = open(path, "xb" if is_new else "wb", buffering=0)
        self._digest = blake3()
        self._buffer = memoryview(bytearray(_GATHERED_BYTES))
        self._gathered = self._written = self._begun = 0
        self._error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
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
        return count

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
        if self._error is not None:
            raise self._error

    def _append_gathered(self) -> None:
        count, self._gathered = self._gathered, 0
        if count:
            self._append(self._buffer[:count])

    def _append(self, data: memoryview) -> None:
        self._digest.update(data)
        try:
            write_all(self._file.fileno(), data)
        except OSError as error:
            self._error = error
            raise
        self._written += len(data)
        self._begin(at_least=_CHUNK_BYTES)

    def _begin(self, *, at_least: int) -> None:
        count = self._written - self._begun
        if _sync_file_range is not None and count >= at_least:
            # Only a hint: what it does not begin the fsync does, which also tells what failed.
            _sync_file_range(self._file.fileno(), self._begun, count, _SYNC_FILE_RANGE_WRITE)
            self._begun = self._written
