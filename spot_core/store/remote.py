"""A tier on any fsspec file system: s3, gs, az, memory, …

The commit record is one small conditional PUT (`mode="create"`), whose outcome is read back whenever it is not
plainly known. Listing caches are off: another writer's changes must be seen. Only the agent and the command line
open such a tier: fsspec's event loop must not live in a process that forks DataLoader workers.
"""

from __future__ import annotations

import contextlib
import glob
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

# Answers to a conditional write whose name exists, or is being written by another.
_REFUSED_CREATE = {"PreconditionFailed", "ConditionalRequestConflict", "412"}

# The user's storage_options win.
_S3_DEFAULTS: dict[str, Any] = {
    "use_listings_cache": False,
    "config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": {"mode": "standard", "max_attempts": 3}},
}


class FsspecTier:
    """A run's folder in an fsspec file system. Threads may share it."""

    def __init__(self, url: str, storage_options: Mapping[str, Any]) -> None:
        self.url = url.rstrip("/")
        scheme = url.partition("://")[0]
        self._is_s3 = scheme in {"s3", "s3a"}
        options = {**(_S3_DEFAULTS if self._is_s3 else {}), **storage_options}
        try:
            self._fs, self._root = fsspec.url_to_fs(self.url, **options)
        except (ValueError, ImportError) as error:
            raise unknown_scheme(url, error) from error
        except TypeError as error:
            raise ConfigError(f"storage_options are not valid for {scheme}://: {error}") from error
        if glob.has_magic(self._root):
            # fsspec expands them when it deletes: `run*` would take every run that starts so.
            raise ConfigError(
                f"{url} contains a wildcard (*, ? or [), which a run's folder must not. Nothing was read."
            )

    def _path(self, relative: str) -> str:
        return f"{self._root}/{relative}"

    def list(self, folder: str) -> list[str]:
        with _translated(f"list {self.url}/{folder}"):
            self._fs.invalidate_cache(self._path(folder))
            try:
                entries = self._fs.ls(self._path(folder), detail=False)
            except FileNotFoundError as error:
                if _code(error) is None:
                    return []
                # An error of the server, such as NoSuchBucket, is no empty listing. Creating the bucket is the
                # owner's decision, never a side effect.
                raise TierDeniedError(f"cannot list {self.url}/{folder}: {error}") from error
            return sorted(entry.rstrip("/").rpartition("/")[2] for entry in entries)

    def read(self, path: str) -> bytes:
        with _translated(f"read {self.url}/{path}"):
            return bytes(self._fs.cat_file(self._path(path)))

    def create(self, path: str, data: bytes) -> None:
        refusal: Exception | None = None
        try:
            with _translated(f"create {self.url}/{path}"):
                self._fs.pipe_file(self._path(path), data, mode="create")
        except TierDeniedError:
            raise
        except (FileExistsError, TierError) as error:
            # The PUT may have landed although its reply did not: only reading back can tell.
            refusal = error
        try:
            found = self.read(path)
        except FileNotFoundError as error:
            raise TierError(f"cannot create {self.url}/{path}: it is not there ({refusal})") from refusal or error
        except TierDeniedError:
            raise
        except TierError as error:
            raise CommitUnknownError(f"outcome of creating {self.url}/{path} is unknown: {error}") from error
        if found != data:
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
                    _pwrite_all(descriptor, data, start)
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
    except (SpotError, FileExistsError):
        raise
    except FileNotFoundError as error:
        if _code(error) == "NoSuchBucket":
            raise TierDeniedError(f"cannot {what}: {error}") from error
        raise
    except PermissionError as error:
        raise TierDeniedError(f"cannot {what}: permission denied ({error})") from error
    except Exception as error:
        if _code(error) in _REFUSED_CREATE:
            raise FileExistsError(what) from error  # some servers make s3fs report it as EINVAL
        denied = type(error).__name__ in {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}
        kind = TierDeniedError if denied else TierError
        raise kind(f"cannot {what}: {type(error).__name__}: {error}") from error


def _code(error: BaseException) -> str | None:
    """The error code of the S3 response behind `error`, None if there is none."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code"))
        cause = cause.__cause__
    return None


def _pwrite_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
