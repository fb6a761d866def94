"""File systems with real folders over a network: sftp, smb, webdav and their like.

Unlike an object store they want folders to be made first, show a file while it is being written, and keep one
connection, which may be lost and which threads must not use at once.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

SCHEMES = frozenset({"sftp", "ssh", "ftp", "smb", "webdav", "dav", "hdfs"})
TEMPORARY = ".tmp-"

# Of two processes that make one folder each looks, and the slower one is refused.
_ATTEMPTS = 3
_SILENCE_S = 60.0
_ANSWERS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)

_T = TypeVar("_T")


class Folders:
    """What a tier in such a file system needs besides. Threads may share it.

    fs: an fsspec file system that nobody else uses (`skip_instance_cache`).
    """

    def __init__(self, fs: Any) -> None:
        self._fs = fs
        self._lock = threading.RLock()
        self._limit_silence()

    def call(self, operation: Callable[[], _T]) -> _T:
        """Run `operation`; once more over a new connection if it failed and that was no answer of the server."""
        with self._lock:
            try:
                return operation()
            except _ANSWERS:
                raise
            except Exception:
                getattr(self._fs, "_connect", lambda: None)()
                self._limit_silence()
                return operation()

    def _limit_silence(self) -> None:
        # paramiko waits for ever for the answer of a server that is gone.
        channel = getattr(getattr(self._fs, "ftp", None), "get_channel", None)
        if channel is not None:
            channel().settimeout(_SILENCE_S)

    def read(self, path: str, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end`."""
        with self._fs.open(path, "rb") as file:
            if hasattr(file, "readv"):
                # paramiko's read waits for each 32 KiB before it asks for the next.
                return b"".join(file.readv([(start, end - start)]))
            file.seek(start)
            return bytes(file.read(end - start))

    def make(self, folder: str) -> None:
        """Create `folder` and those above it where they are missing."""
        for attempt in range(_ATTEMPTS):
            try:
                self._fs.makedirs(folder, exist_ok=True)
                return
            except OSError:
                if not self._fs.isdir(folder) and attempt == _ATTEMPTS - 1:
                    raise

    def missing(self, folder: str) -> list[str]:
        """`folder` and those above it that do not exist, deepest first."""
        found = []
        while folder.strip("/") and not self._fs.exists(folder):
            found.append(folder)
            folder = folder.rpartition("/")[0]
        return found

    def remove_empty(self, folders: Iterable[str]) -> None:
        """Remove those of `folders`, deepest first, that hold nothing."""
        for folder in folders:
            if self._fs.ls(folder, detail=False):
                return
            self._fs.rmdir(folder)

    def write(self, path: str, data: bytes, *, mode: str = "overwrite") -> None:
        """Write a record under another name first: a kill in the middle must not leave half of one.

        mode: `create` raises FileExistsError for what is there; of racing writers more than one may succeed.
        """
        if mode == "create" and self._fs.exists(path):
            raise FileExistsError(path)
        folder, _, name = path.rpartition("/")
        self.make(folder)
        temporary = f"{folder}/{TEMPORARY}{uuid.uuid4().hex}-{name}"
        try:
            self._fs.pipe_file(temporary, data)
            self._fs.mv(temporary, path)
        except BaseException:
            with contextlib.suppress(Exception):
                self._fs.rm_file(temporary)
            raise
