"""A tier on any fsspec file system: s3, gs, az, memory, …

The commit record is one small conditional PUT (`mode="create"`), whose outcome is read back unless a store that has
been seen to refuse says that it took it. Listing caches are off: another writer's changes must be seen. Only the agent
and the command line open such a tier: fsspec's event loop must not live in a process that forks DataLoader workers.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from blake3 import blake3

from spot_core.bounded import in_order
from spot_core.errors import (
    CommitConflictError,
    CommitUnknownError,
    ConfigError,
    SpotError,
    TierDeniedError,
    TierError,
    shown,
)
from spot_core.store import folders, s3
from spot_core.store.digesting import PlacedFile
from spot_core.store.manifest import FileRecord
from spot_core.store.s3 import S3
from spot_core.store.s3_files import PARALLEL_PARTS, PART_BYTES
from spot_core.store.signing import UNSIGNED, Signing
from spot_core.store.tier import RECORD_BYTES, OnBytes, Place, check_record_size, unknown_scheme

logger = logging.getLogger(__name__)

# Answers to a conditional write whose name exists, or is being written by another.
_REFUSED_CREATE = {"PreconditionFailed", "ConditionalRequestConflict", "412"}

# Whose file system sends `mode="create"` as a condition to the server. The others look first, then write.
_CONDITIONAL = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}

# Where file systems tell when a file was last written, in the order tried.
_MODIFIED = ("LastModified", "mtime", "last_modified", "updated", "created")

_T = TypeVar("_T")


class FsspecTier:
    """A run's folder in an fsspec file system. Threads may share it.

    overwrites: whether it is known not to refuse a create over what exists; see `refuses_overwrite`.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any], signing: Signing = UNSIGNED) -> None:
        self.url = shown(url.rstrip("/"))
        self.signing = signing
        scheme = url.partition("://")[0]
        self._is_conditional = scheme in _CONDITIONAL
        self.overwrites = False
        self._has_refused = False
        is_s3 = s3.is_s3(url)
        options = s3.with_defaults(storage_options) if is_s3 else dict(storage_options)
        if scheme in folders.SCHEMES:
            options["skip_instance_cache"] = True
        try:
            self._fs, self._root = fsspec.url_to_fs(url.rstrip("/"), **options)
        except (ValueError, ImportError) as error:
            raise unknown_scheme(url, error) from error
        except TypeError as error:
            raise ConfigError(f"storage_options are not valid for {scheme}://: {error}") from error
        except Exception as error:  # some connect at once: to a wrong address, or as the wrong user
            with _translated(f"open {self.url}"):
                raise error
        if glob.has_magic(self._root):
            # fsspec expands them when it deletes: `run*` would take every run that starts so.
            raise ConfigError(
                f"{self.url} contains a wildcard (*, ? or [), which a run's folder must not. Nothing was read."
            )

        # Of several large files each would hold its own parts in memory: those of all together fill the network.
        self._slots = threading.Semaphore(PARALLEL_PARTS)
        self._s3 = S3(self._fs, self._root, self._slots) if is_s3 else None
        self._folders = folders.Folders(self._fs) if scheme in folders.SCHEMES else None

    def _path(self, relative: str) -> str:
        return f"{self._root}/{relative}"

    def _do(self, what: str, path: str, operation: Callable[[], _T]) -> _T:
        with _translated(f"{what} {self.url}/{path}"):
            if self._folders:
                return self._folders.call(operation)
            return self._s3.call(operation) if self._s3 else operation()

    def _write(self, path: str, data: bytes, mode: str) -> None:
        (self._folders.write if self._folders else self._fs.pipe_file)(self._path(path), data, mode=mode)

    def list(self, folder: str, *, after: str = "", most: int | None = None) -> list[str]:
        def ls() -> list[str]:
            try:
                if self._s3:
                    return self._s3.entries(folder, after, most)
                self._fs.invalidate_cache(self._path(folder))
                return [str(entry) for entry in self._fs.ls(self._path(folder), detail=False)]
            except FileNotFoundError as error:
                if s3.code_of(error) is None:
                    return []
                # An error of the server, such as NoSuchBucket, is no empty listing. Creating the bucket is the
                # owner's decision, never a side effect.
                raise TierDeniedError(f"cannot list {self.url}/{folder}: {s3.reason(error)}") from error

        found = sorted(entry.rstrip("/").rpartition("/")[2] for entry in self._do("list", folder, ls))
        ours = (entry for entry in found if not (self._folders and entry.startswith(folders.TEMPORARY)))
        return [entry for entry in ours if entry > after][:most]

    def read(self, path: str) -> bytes:
        data = self._do("read", path, lambda: self._head(path))
        check_record_size(f"{self.url}/{path}", len(data))
        return data

    def _head(self, path: str) -> bytes:
        """The first bytes, enough to tell whether it is too large to be a record."""
        if self._s3 is None:
            check_record_size(f"{self.url}/{path}", int(self._fs.info(self._path(path))["size"]))
            return bytes(self._fs.cat_file(self._path(path)))
        try:
            return bytes(self._fs.cat_file(self._path(path), start=0, end=RECORD_BYTES + 1))
        except Exception as error:
            if s3.code_of(error) in {"InvalidRange", "416"}:
                return b""  # an empty object has no first byte
            raise

    def create(self, path: str, data: bytes) -> None:
        refusal: Exception | None = None
        try:
            if not (self.overwrites and self._exists(path)):
                self._do("create", path, lambda: self._write(path, data, "create"))
                if self._has_refused:
                    return  # it keeps to the condition, so nothing was there, and it says that it took this
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

    def _exists(self, path: str) -> bool:
        try:
            self.read(path)
        except FileNotFoundError:
            return False
        return True

    def prepare(self) -> None:
        if self._s3:
            self._s3.prepare()

    def refuses_overwrite(self, path: str, data: bytes) -> bool:
        if not self._is_conditional:
            self.overwrites = True
            return False
        try:
            self._do("create", path, lambda: self._write(path, data, "create"))
        except FileExistsError:
            self._has_refused = True
            return True
        except TierDeniedError:
            return True  # the same write was allowed a moment ago, when there was no file
        self.overwrites = True
        return False

    def replace(self, path: str, data: bytes) -> None:
        self._do("write", path, lambda: self._write(path, data, "overwrite"))

    def upload(self, source: Path, path: str, on_bytes: OnBytes) -> FileRecord | None:
        if self._s3:
            with _translated(f"write {self.url}/{path}"):
                return self._s3.put_file(source, path, on_bytes)

        def put() -> None:
            if self._folders:
                self._folders.make(self._path(path).rpartition("/")[0])
            self._fs.put_file(str(source), self._path(path))

        self._do("write", path, put)
        on_bytes(source.stat().st_size)
        return None

    def sweep_uploads(self, before_incarnation: int) -> int:
        if self._s3 is None:
            return 0
        try:
            with _translated(f"sweep unfinished uploads of {self.url}"):
                return self._s3.sweep_uploads(before_incarnation)
        except (TierError, FileNotFoundError, FileExistsError) as error:
            logger.info(
                "%s. Nothing depends on it, but what earlier lives left unfinished takes space: allow "
                "s3:ListBucketMultipartUploads, or set a lifecycle rule that aborts incomplete uploads.",
                error,
            )
            return 0

    def _fetch(self, path: str, start: int, end: int) -> bytes:
        if self._folders:
            return self._do("read", path, partial(self._folders.read, self._path(path), start, end))
        if self._s3:
            with _translated(f"read {self.url}/{path}"):
                return self._s3.read(path, start, end)
        return self._do("read", path, lambda: bytes(self._fs.cat_file(self._path(path), start=start, end=end)))

    def size(self, path: str) -> int:
        return self._do("read", path, lambda: int(self._fs.info(self._path(path))["size"]))

    def modified_unix_s(self, path: str) -> float | None:
        info = self._do("read", path, lambda: dict(self._fs.info(self._path(path))))
        return next((unix_s for name in _MODIFIED if (unix_s := _unix_s(info.get(name))) is not None), None)

    @property
    def bucket(self) -> S3 | None:
        """The folder of a bucket that this tier is, None on what is not S3."""
        return self._s3

    def make_root(self) -> Callable[[], None]:
        """Make the run's folder where the file system wants that; returns what removes those it made, while empty."""
        if self._folders is None:
            return lambda: None
        missing = self._do("look for", "", partial(self._folders.missing, self._root))
        self._do("make", "", partial(self._folders.make, self._root))
        return partial(self._do, "remove", "", partial(self._folders.remove_empty, missing))

    def download(self, path: str, target: Path, on_bytes: OnBytes, *, size: int | None = None) -> FileRecord:
        size = self.size(path) if size is None else size
        with _translated(f"read {self.url}/{path}"):
            file = PlacedFile(target)

            def fetch(start: int, end: int) -> int:
                count = self._place(path, start, end, file.place)
                file.begin(start, count)
                return count

            with contextlib.closing(self._parts(size, fetch, are_results_large=False)) as parts:
                for count in parts:
                    file.digest(count)
                    on_bytes(count)
            return file.durable(path)

    def _place(self, path: str, start: int, end: int, place: Place) -> int:
        if self._s3:
            with _translated(f"read {self.url}/{path}"):
                return self._s3.place(path, start, end, place)
        part = self._fetch(path, start, end)
        place(start, part)
        return len(part)

    def record(self, path: str) -> FileRecord:
        digest, read = blake3(), 0
        fetch = partial(self._fetch, path)
        with contextlib.closing(self._parts(self.size(path), fetch, are_results_large=True)) as parts:
            for part in parts:
                digest.update(part)
                read += len(part)
        return FileRecord(path, read, digest.hexdigest())

    def _parts(
        self, size: int, fetch: Callable[[int, int], _T], *, are_results_large: bool
    ) -> Generator[_T, None, None]:
        """What `fetch` gives for each part, from its start to its end; a few travel at a time. To be closed."""
        # Ranged reads are retried whole by the file system; get_file would leave garbage after a reset in mid-body.
        fetches = (partial(fetch, at, min(at + PART_BYTES, size)) for at in range(0, size, PART_BYTES))
        if size <= PART_BYTES:
            yield from (each() for each in fetches)
            return
        with contextlib.closing(in_order(fetches, self._slots, are_results_large=are_results_large)) as parts:
            yield from parts

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                self._do("delete", path, lambda: self._rm(path))  # noqa: B023

    def _rm(self, path: str) -> None:
        if self._s3:
            self._s3.delete(path)
        else:
            self._fs.rm(self._path(path), recursive=True)


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Map what fsspec and the client under it raise onto this project's errors."""
    try:
        yield
    except (SpotError, FileExistsError):
        raise
    except FileNotFoundError as error:
        if s3.code_of(error) == "NoSuchBucket":
            raise TierDeniedError(shown(f"cannot {what}: {s3.reason(error)}")) from error
        raise
    except PermissionError as error:
        raise TierDeniedError(shown(f"cannot {what}: permission denied ({s3.reason(error)})")) from error
    except Exception as error:
        if s3.code_of(error) in _REFUSED_CREATE:
            raise FileExistsError(what) from error  # some servers make s3fs report it as EINVAL
        denied = type(error).__name__ in {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}
        kind = TierDeniedError if denied else TierError
        raise kind(shown(f"cannot {what}: {type(error).__name__}: {error}")) from error


def _unix_s(when: object) -> float | None:
    """A moment as file systems give it: a number, a datetime, or text; None for anything else."""
    if isinstance(when, str):
        with contextlib.suppress(ValueError):
            when = datetime.fromisoformat(when.replace("Z", "+00:00"))
    if isinstance(when, datetime):
        return (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp()
    return float(when) if isinstance(when, (int, float)) else None
