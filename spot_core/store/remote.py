"""A tier on any fsspec file system: s3, gs, az, memory, …

The commit record is one small conditional PUT (`mode="create"`), whose outcome is read back whenever it is not
plainly known. Listing caches are off: another writer's changes must be seen. Only the agent and the command line
open such a tier: fsspec's event loop must not live in a process that forks DataLoader workers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
from blake3 import blake3

from spot_core.errors import (
    CommitConflictError,
    CommitUnknownError,
    ConfigError,
    SpotError,
    TierDeniedError,
    TierError,
)
from spot_core.store.manifest import FileRecord
from spot_core.store.posix import write_all
from spot_core.store.tier import CHUNK_BYTES, OnBytes, unknown_scheme

PART_BYTES = 16 << 20
PARALLEL_PARTS = 4

# Settings that every store of the scheme needs; the user's storage_options win.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "s3": {
        "use_listings_cache": False,
        "config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": {"mode": "standard", "max_attempts": 3}},
    }
}


class FsspecTier:
    """A run's folder in an fsspec file system. Threads may share it."""

    def __init__(self, url: str, storage_options: Mapping[str, Any]) -> None:
        self.url = url.rstrip("/")
        scheme = url.partition("://")[0]
        options = {**_DEFAULTS.get(scheme, {}), **storage_options}
        try:
            self._fs, self._root = fsspec.url_to_fs(self.url, **options)
        except (ValueError, ImportError) as error:
            raise unknown_scheme(url, error) from error
        except TypeError as error:
            raise ConfigError(f"storage_options are not valid for {scheme}://: {error}") from error
        self._is_s3 = scheme in {"s3", "s3a"}

    def _path(self, relative: str) -> str:
        return f"{self._root}/{relative}"

    def list(self, folder: str) -> list[str]:
        with _translated(f"list {self.url}/{folder}"):
            self._fs.invalidate_cache(self._path(folder))
            try:
                entries = self._fs.ls(self._path(folder), detail=False)
            except FileNotFoundError:
                self._check_bucket()
                return []
            return sorted(entry.rstrip("/").rpartition("/")[2] for entry in entries)

    def _check_bucket(self) -> None:
        # A missing bucket lists like an empty folder. Creating it is the owner's decision, never a side effect.
        bucket = self._root.partition("/")[0]
        if self._is_s3 and not self._fs.exists(bucket):
            raise TierDeniedError(f"bucket {bucket!r} does not exist or is not visible with these credentials")

    def read(self, path: str) -> bytes:
        with _translated(f"read {self.url}/{path}"):
            return bytes(self._fs.cat_file(self._path(path)))

    def create(self, path: str, data: bytes) -> None:
        try:
            with _translated(f"create {self.url}/{path}"):
                self._fs.pipe_file(self._path(path), data, mode="create")
        except FileExistsError:
            pass
        except TierDeniedError:
            raise
        except TierError as error:
            # The PUT may have landed although its reply did not: only reading back can tell.
            try:
                found = self.read(path)
            except FileNotFoundError:
                raise error from None
            except TierError:
                raise CommitUnknownError(f"outcome of creating {self.url}/{path} is unknown") from error
            if found == data:
                return
        if self.read(path) != data:
            raise CommitConflictError(f"{self.url}/{path} exists with other content")

    def replace(self, path: str, data: bytes) -> None:
        with _translated(f"write {self.url}/{path}"):
            self._fs.pipe_file(self._path(path), data)

    def upload(self, source: Path, path: str, on_bytes: OnBytes) -> None:
        options: dict[str, Any] = {"chunksize": PART_BYTES, "max_concurrency": PARALLEL_PARTS} if self._is_s3 else {}
        with _translated(f"write {self.url}/{path}"):
            self._fs.put_file(str(source), self._path(path), **options)
        on_bytes(source.stat().st_size)

    def download(self, path: str, target: Path, on_bytes: OnBytes) -> None:
        # Ranged reads are retried whole by the file system; get_file would leave garbage after a reset in mid-body.
        with _translated(f"read {self.url}/{path}"):
            size = int(self._fs.info(self._path(path))["size"])
            with open(target, "wb", buffering=0) as file:
                descriptor = file.fileno()

                def fetch(start: int) -> None:
                    data = self._fs.cat_file(self._path(path), start=start, end=min(start + PART_BYTES, size))
                    os.pwrite(descriptor, data, start)
                    on_bytes(len(data))

                if size > PART_BYTES:
                    with ThreadPoolExecutor(PARALLEL_PARTS) as pool:
                        list(pool.map(fetch, range(0, size, PART_BYTES)))
                elif size:
                    data = self._fs.cat_file(self._path(path))
                    write_all(descriptor, data)
                    on_bytes(len(data))
                os.fsync(descriptor)

    def record(self, path: str) -> FileRecord:
        with _translated(f"read {self.url}/{path}"):
            size = int(self._fs.info(self._path(path))["size"])
            digest, read = blake3(), 0
            for start in range(0, size, CHUNK_BYTES):
                chunk = self._fs.cat_file(self._path(path), start=start, end=min(start + CHUNK_BYTES, size))
                digest.update(chunk)
                read += len(chunk)
            return FileRecord(path, read, digest.hexdigest())

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            with _translated(f"delete {self.url}/{path}"), contextlib.suppress(FileNotFoundError):
                self._fs.rm(self._path(path), recursive=True)


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Map what fsspec and the client under it raise onto this project's errors."""
    try:
        yield
    except (SpotError, FileNotFoundError):
        raise
    except FileExistsError:
        raise
    except PermissionError as error:
        raise TierDeniedError(f"cannot {what}: permission denied ({error})") from error
    except Exception as error:
        if _is_precondition(error):
            raise FileExistsError(what) from error
        denied = type(error).__name__ in {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}
        kind = TierDeniedError if denied else TierError
        raise kind(f"cannot {what}: {type(error).__name__}: {error}") from error


def _is_precondition(error: BaseException) -> bool:
    """Whether a conditional write was refused; some servers make s3fs report it as EINVAL."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            code = response.get("Error", {}).get("Code")
            if code in {"PreconditionFailed", "ConditionalRequestConflict", "412"}:
                return True
        cause = cause.__cause__
    return False
