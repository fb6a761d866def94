"""What a tier must do, and how one is opened from a URL.

A tier is a run's folder somewhere: paths are relative to it. The protocol is small on purpose: what commits,
drains and restores need, and nothing that a plain object store cannot do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from blake3 import blake3

from spot_core.errors import ConfigError, CorruptCheckpointError
from spot_core.store.manifest import FileRecord

CHUNK_BYTES = 8 << 20
OnBytes = Callable[[int], None]


class Tier(Protocol):
    """A run's folder on one storage system. Raises TierError to be retried, TierDeniedError when refused."""

    url: str

    def list(self, folder: str) -> list[str]:
        """Names of the entries directly in `folder`; empty if there is none. Never answers from a cache."""

    def read(self, path: str) -> bytes:
        """The whole content. Raises FileNotFoundError."""

    def create(self, path: str, data: bytes) -> None:
        """Write all of `data` under a name that must not exist; of racing writers exactly one succeeds.

        Raises CommitConflictError if the name holds other content. The same content again is success: the reply
        to the first write may have been lost.
        """

    def replace(self, path: str, data: bytes) -> None:
        """Write `data` whole, over what is there. Only for files with one owner."""

    def upload(self, source: Path, path: str, on_bytes: OnBytes) -> None:
        """Copy a local file into the tier. The name may hold a torn copy until this returns."""

    def download(self, path: str, target: Path, on_bytes: OnBytes) -> None:
        """Copy to a local file, durably. The caller verifies. Raises FileNotFoundError."""

    def record(self, path: str) -> FileRecord:
        """Read the stored bytes back and digest them. Raises FileNotFoundError."""

    def delete(self, paths: Iterable[str]) -> None:
        """Delete files, folders with what they hold; those already gone are not an error."""


@runtime_checkable
class ObjectStore(Protocol):
    """What a tier in an object store does besides."""

    overwrites: bool

    def refuses_overwrite(self, path: str, data: bytes) -> bool:
        """Whether a create-only write is refused where there is a file already.

        path, data: of a file that the caller has just created. It is written again as it is, so that finding out
        leaves nothing behind and needs no further permission. False sets `overwrites`: `create` looks first then.
        """

    def sweep_uploads(self, before_incarnation: int) -> int:
        """Abort what earlier lives of this run were uploading when they died; returns how many. Raises nothing."""


def open_tier(url: str, storage_options: Mapping[str, Any] | None = None) -> Tier:
    """The tier at `url`: any fsspec scheme, `file://` or a plain path.

    Raises ConfigError for an unknown scheme, one whose package is missing, or options it does not take.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme in {"file", "local"}:
        from spot_core.store.posix import PosixTier

        return PosixTier(rest if separator else url)
    from spot_core.store.remote import FsspecTier

    return FsspecTier(url, storage_options or {})


def check_record(found: FileRecord, wanted: FileRecord, where: str) -> None:
    """Raise CorruptCheckpointError unless `found` has the size and digest of `wanted`."""
    if found.bytes != wanted.bytes:
        raise CorruptCheckpointError(f"{where}/{wanted.path} has {found.bytes} bytes, the manifest says {wanted.bytes}")
    if found.digest != wanted.digest:
        raise CorruptCheckpointError(f"{where}/{wanted.path} does not have the digest of its manifest")


def digest_file(path: Path) -> FileRecord:
    """Size and digest of a local file."""
    digest, size = blake3(), 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(path.name, size, digest.hexdigest())


def unknown_scheme(url: str, reason: object) -> ConfigError:
    scheme = url.partition("://")[0]
    hint = "; install it with: pip install 'spot-callbacks[s3]'" if scheme in {"s3", "s3a"} else ""
    return ConfigError(f"cannot open {scheme}:// ({reason}){hint}. Nothing was read or written.")
