"""What a tier must do, and how one is opened from a URL.

A tier is a run's folder somewhere: paths are relative to it. The protocol is small on purpose: what commits,
drains and restores need, and nothing that a plain object store cannot do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from blake3 import blake3

from spot_core.config import run_name
from spot_core.errors import ConfigError, CorruptCheckpointError, shown
from spot_core.store.manifest import FileRecord
from spot_core.store.signing import Signing

# Read by as much as a processor's own cache holds: digested or copied from there it takes a third of the time.
BLOCK_BYTES = 512 << 10
# What `read` gives, at most. Manifests and the other records are far smaller; one that is not was not written by us.
RECORD_BYTES = 64 << 20
OnBytes = Callable[[int], None]
# Told of bytes and where in a file they start.
Place = Callable[[int, bytes], None]

# What brings the file system of a scheme.
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "'spot-callbacks[s3]'"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    **dict.fromkeys(("webdav", "dav"), "'webdav4[fsspec]'"),
    "hf": "huggingface_hub",
    "smb": "smbprotocol",
}


class Tier(Protocol):
    """A run's folder on one storage system. Raises TierError to be retried, TierDeniedError when refused.

    url: for people: without a password. signing: the keys of this run's records.
    """

    url: str
    signing: Signing

    def list(self, folder: str, *, after: str = "", most: int | None = None) -> list[str]:
        """Names of the entries directly in `folder`, in order; empty if there is none. Never answers from a cache.

        after, most: only those that come after this one, and so many of them at most.
        """

    def read(self, path: str) -> bytes:
        """The whole content of a record. Raises FileNotFoundError, CorruptCheckpointError above RECORD_BYTES."""

    def create(self, path: str, data: bytes) -> None:
        """Write all of `data` under a name that must not exist; of racing writers exactly one succeeds.

        Raises CommitConflictError if the name holds other content. The same content again is success: the reply
        to the first write may have been lost.
        """

    def replace(self, path: str, data: bytes) -> None:
        """Write `data` whole, over what is there. Only for files with one owner."""

    def upload(self, source: Path, path: str, on_bytes: OnBytes) -> FileRecord | None:
        """Copy a local file into the tier. The name may hold a torn copy until this returns.

        Returns what was sent if the store itself attests that it holds just that. None: `record` tells.
        """

    def download(self, path: str, target: Path, on_bytes: OnBytes, *, size: int | None = None) -> FileRecord:
        """Copy to a local file, durably; returns what arrived, for the caller to verify. Raises FileNotFoundError.

        size: bytes of what is stored, where the caller knows: it need not be asked for.
        """

    def size(self, path: str) -> int:
        """Bytes of what is stored, without reading it. Raises FileNotFoundError."""

    def record(self, path: str) -> FileRecord:
        """Read the stored bytes back and digest them. Raises FileNotFoundError."""

    def delete(self, paths: Iterable[str]) -> None:
        """Delete files, folders with what they hold; those already gone are not an error."""


@runtime_checkable
class ObjectStore(Protocol):
    """What a tier in an object store does besides."""

    overwrites: bool

    def prepare(self) -> None:
        """Have what the first requests need besides their answers: credentials and clients. Raises what those raise."""

    def refuses_overwrite(self, path: str, data: bytes) -> bool:
        """Whether a create-only write is refused where there is a file already.

        path, data: of a file that the caller has just created. It is written again as it is, so that finding out
        leaves nothing behind and needs no further permission. False sets `overwrites`: `create` looks first then.
        """

    def sweep_uploads(self, before_incarnation: int) -> int:
        """Abort what earlier lives of this run were uploading when they died; returns how many. Raises nothing."""


@runtime_checkable
class Dated(Protocol):
    """What a tier does besides that can tell when a file was written."""

    def modified_unix_s(self, path: str) -> float | None:
        """By the clock of whoever stores it; None if that does not tell. Raises FileNotFoundError."""


def open_tier(url: str, storage_options: Mapping[str, Any] | None = None, signing_keys: tuple[str, ...] = ()) -> Tier:
    """The tier at `url`: any fsspec scheme, `file://` or a plain path.

    Raises ConfigError for an unknown scheme, one whose package is missing, or options it does not take.
    """
    signing = Signing(run_name(url), signing_keys)
    scheme, separator, rest = url.partition("://")
    if not separator or scheme in {"file", "local"}:
        from spot_core.store.posix import PosixTier

        return PosixTier(rest if separator else url, signing)
    from spot_core.store.remote import FsspecTier

    return FsspecTier(url, storage_options or {}, signing)


def preload(scheme: str) -> None:
    """Import what opens a tier of that scheme, which for s3 takes about a second. Opening it tells what is missing."""
    if scheme not in {"file", "local"}:
        with contextlib.suppress(Exception):
            import fsspec

            from spot_core.store import remote  # noqa: F401

            fsspec.get_filesystem_class(scheme)


def forget(scheme: str) -> None:
    """Have the next tier of that scheme look up its credentials anew, which file systems keep for the process."""
    with contextlib.suppress(Exception):
        import fsspec

        fsspec.get_filesystem_class(scheme).clear_instance_cache()


def check_record(found: FileRecord, wanted: FileRecord, where: str) -> None:
    """Raise CorruptCheckpointError unless `found` has the size and digest of `wanted`."""
    check_size(found.bytes, wanted, where)
    if found.digest != wanted.digest:
        raise CorruptCheckpointError(f"{where}/{wanted.path} does not have the digest of its manifest")


def check_size(found_bytes: int, wanted: FileRecord, where: str) -> None:
    """Raise CorruptCheckpointError unless that is the size of `wanted`."""
    if found_bytes != wanted.bytes:
        raise CorruptCheckpointError(f"{where}/{wanted.path} has {found_bytes} bytes, the manifest says {wanted.bytes}")


def check_record_size(where: str, size: int) -> None:
    """Raise CorruptCheckpointError if what is stored at `where` is larger than any record."""
    if size > RECORD_BYTES:
        raise CorruptCheckpointError(f"{where} has {size} bytes or more: no record has more than {RECORD_BYTES}")


def digest_file(path: Path) -> FileRecord:
    """Size and digest of a local file."""
    digest, size = blake3(), 0
    with open(path, "rb", buffering=0) as file:
        for block in blocks(file):
            digest.update(block)
            size += len(block)
    return FileRecord(path.name, size, digest.hexdigest())


def blocks(file: FileIO) -> Iterator[memoryview]:
    """What an unbuffered file holds, in order. Each is good until the next one is asked for."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    while count := file.readinto(buffer):
        yield buffer[:count]


def unknown_scheme(url: str, reason: object) -> ConfigError:
    scheme = url.partition("://")[0]
    package = _PACKAGES.get(scheme)
    hint = f"; install it with: pip install {package}" if package and isinstance(reason, ImportError) else ""
    return ConfigError(shown(f"cannot open {scheme}:// ({reason}){hint}. Nothing was read or written."))
