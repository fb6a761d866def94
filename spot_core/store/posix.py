"""A tier in a POSIX folder, with the local commit (design.md section 3).

Every write is durable when it returns: content, then the name, then the folder are fsynced. Names that must be
created once are made with `link`, which is atomic and fails if the name exists; a file system without hard links
falls back to O_EXCL, where a crash can leave a torn file that readers reject.

Below the run's folder nothing is a symbolic link: none is followed, and deleting one leaves alone what it points to.
The folder itself may be reached through links: that is the user's choice.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from spot_core.errors import CommitConflictError, ConfigError, CorruptCheckpointError, TierDeniedError, TierError
from spot_core.store import layout
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import FileRecord, Manifest
from spot_core.store.signing import UNSIGNED, Signing
from spot_core.store.tier import RECORD_BYTES, OnBytes, blocks, check_record_size, digest_file

_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


class PosixTier:
    """A run's folder on a mounted file system; serves as local tier and as `file://` remote."""

    def __init__(self, root: str | Path, signing: Signing = UNSIGNED) -> None:
        self.root = Path(root).expanduser().absolute()
        self.url = str(self.root)
        self.signing = signing

    def path(self, relative: str) -> Path:
        return self.root / relative

    def _place(self, relative: str) -> Path:
        """The path of what may be written or deleted. Raises TierDeniedError if a link would lead elsewhere."""
        link = self._first_link(str(Path(relative).parent))
        if link is not None:
            raise TierDeniedError(f"{link} is a symbolic link, which is not followed: move the run's folder instead")
        return self.path(relative)

    def _stored(self, relative: str) -> Path:
        """The path of what is to be read. Raises CorruptCheckpointError if it is a link or no file."""
        link = self._first_link(relative)
        if link is not None:
            raise CorruptCheckpointError(f"{link} is a symbolic link, which is not followed")
        path = self.path(relative)
        if not stat.S_ISREG(path.lstat().st_mode):
            raise CorruptCheckpointError(f"{path} is not a file")
        return path

    def _first_link(self, relative: str) -> Path | None:
        path = self.root
        for part in Path(relative).parts:
            path = path / part
            if path.is_symlink():
                return path
        return None

    # -- the Tier protocol ---------------------------------------------------------------------------------

    def list(self, folder: str, *, after: str = "", most: int | None = None) -> list[str]:
        with _translated(f"list {self.path(folder)}"):
            try:
                found = os.listdir(self.path(folder))
            except FileNotFoundError:
                return []
            return sorted(entry for entry in found if entry > after and not entry.startswith(".tmp-"))[:most]

    def read(self, path: str) -> bytes:
        with _translated(f"read {self.path(path)}"):
            with open(self._stored(path), "rb") as file:
                data = file.read(RECORD_BYTES + 1)
            check_record_size(str(self.path(path)), len(data))
            return data

    def create(self, path: str, data: bytes) -> None:
        target = self._place(path)
        with _translated(f"create {target}"):
            self.make_folder(target.parent)
            with _temporary(target) as temporary:
                write_durably(temporary, data)
                try:
                    os.link(temporary, target)
                except FileExistsError:
                    if target.read_bytes() != data:
                        raise CommitConflictError(f"{target} exists with other content") from None
                except OSError as error:
                    if error.errno not in _NO_HARD_LINKS:
                        raise
                    _create_exclusively(target, data)
            fsync_folder(target.parent)

    def replace(self, path: str, data: bytes) -> None:
        target = self._place(path)
        with _translated(f"write {target}"):
            self.make_folder(target.parent)
            with _temporary(target) as temporary:
                write_durably(temporary, data)
                os.replace(temporary, target)
            fsync_folder(target.parent)

    def upload(self, source: Path, path: str, on_bytes: OnBytes) -> FileRecord | None:
        target = self._place(path)
        with _translated(f"write {target}"):
            self.make_folder(target.parent)
            with _temporary(target) as temporary:
                _copy_durably(source, temporary, on_bytes)
                os.replace(temporary, target)
            fsync_folder(target.parent)
        return None

    def download(self, path: str, target: Path, on_bytes: OnBytes, *, size: int | None = None) -> FileRecord:
        with _translated(f"read {self.path(path)}"):
            _copy_durably(self._stored(path), target, on_bytes)
            return digest_file(target)

    def size(self, path: str) -> int:
        with _translated(f"read {self.path(path)}"):
            return self._stored(path).stat().st_size

    def modified_unix_s(self, path: str) -> float | None:
        with _translated(f"read {self.path(path)}"):
            return self._stored(path).stat().st_mtime

    def record(self, path: str) -> FileRecord:
        with _translated(f"read {self.path(path)}"):
            return digest_file(self._stored(path))

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            target = self._place(path)
            with _translated(f"delete {target}"), contextlib.suppress(FileNotFoundError):
                while target.is_dir() and not target.is_symlink():
                    # Another life's agent may be deleting here too: what it took first is no error.
                    with contextlib.suppress(FileNotFoundError):
                        shutil.rmtree(target)
                target.unlink(missing_ok=True)
                # A manifest must be gone for good before its files go.
                fsync_folder(target.parent)

    # -- the local commit ----------------------------------------------------------------------------------

    def stage(self, name: CheckpointName) -> Path:
        """A fresh, empty staging folder for `name`, on the same file system as its final place."""
        folder = self._place(f"{layout.STAGING}/{name}")
        with _translated(f"create {folder}"):
            if folder.is_symlink():
                folder.unlink()
            elif folder.exists():
                shutil.rmtree(folder)
            self.make_folder(folder)
        return folder

    def commit(self, staged: Path, manifest: Manifest) -> None:
        """Publish a staged folder whose files are already fsynced. Crash-safe at every point in between.

        1. fsync the staged folders. 2. rename into place. 3. fsync the parent. 4. create the manifest, signed.
        Raises CommitConflictError if this name is committed already, CorruptCheckpointError for a manifest that a
        resume would refuse.
        """
        record = self.signing.signed(layout.manifest(manifest.name), manifest.to_json())
        Manifest.from_json(record, name=manifest.name)
        final = self._place(layout.checkpoint(manifest.name))
        if self.path(layout.manifest(manifest.name)).exists():
            raise CommitConflictError(f"{final} is committed already")
        with _translated(f"commit {final}"):
            for folder, _, _ in os.walk(staged):
                fsync_folder(Path(folder))
            self.make_folder(final.parent)
            if os.path.lexists(final):
                # Left by an attempt that got no manifest: not a checkpoint, and in the way of the rename.
                self.delete([layout.checkpoint(manifest.name)])
            os.replace(staged, final)
            fsync_folder(final.parent)
        self.create(layout.manifest(manifest.name), record)

    def set_strangers_aside(self, manifest: Manifest) -> tuple[str, ...]:
        """Move what lies in a checkpoint's folder but not in its manifest to `damaged/`; returns what that was.

        Whoever loads the folder then loads nothing that was not verified.
        """
        folder = self.path(layout.checkpoint(manifest.name))
        named = {file.path for file in manifest.files}
        strangers = []
        for below, folders, files in os.walk(folder):
            links = [entry for entry in folders if (Path(below) / entry).is_symlink()]
            places = (str((Path(below) / entry).relative_to(folder)) for entry in (*files, *links))
            strangers += [place for place in places if place not in named]
        if strangers:
            aside = self._new_aside(manifest.name)
            with _translated(f"set aside {manifest.name}"):
                for place in strangers:
                    self.make_folder((aside / place).parent)
                    os.replace(folder / place, aside / place)
        return tuple(sorted(strangers))

    def _new_aside(self, name: CheckpointName) -> Path:
        return self._place(f"{layout.DAMAGED}/{len(self.list(layout.DAMAGED)):03d}-{name}")

    def set_aside(self, name: CheckpointName) -> Path:
        """Move a damaged checkpoint out of the way, manifest first, so that it can be looked at later."""
        folder = self._new_aside(name)
        with _translated(f"set aside {name}"):
            self.make_folder(folder)
            for source in (layout.manifest(name), layout.checkpoint(name)):
                if os.path.lexists(self._place(source)):
                    os.replace(self.path(source), folder / Path(source).name)
        return folder

    def make_folder(self, folder: Path) -> None:
        """Create `folder` and its parents, durably."""
        missing = []
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for new in reversed(missing):
            new.mkdir(exist_ok=True)
            fsync_folder(new.parent)


def check_usable(folder: Path, needed_bytes: int, *, elsewhere_bytes: int = 0) -> None:
    """Create a run's folder; raise ConfigError unless it can be written and has room for `needed_bytes`.

    What the run holds there already counts as room: the next life of a run on a tight disk must start.
    elsewhere_bytes: how large a checkpoint may be that does not fit there.
    """
    for part in (layout.CHECKPOINTS, layout.MANIFESTS, layout.STAGING, layout.JOURNAL):
        if (folder / part).is_symlink():
            raise ConfigError(
                f"{folder / part} is a symbolic link, and none is followed below a run's folder. Nothing was written. "
                "Move or link the whole folder of the run, or set local= (SPOT_LOCAL)."
            )
    probe = folder / f".tmp-probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"probe")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the local folder {folder} cannot be written: {error.strerror}. Nothing was written. Set local= "
            "(SPOT_LOCAL) to a folder on a disk of this instance."
        ) from error
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > max(free_bytes + held_bytes(folder), elsewhere_bytes):
        raise ConfigError(
            f"the local folder {folder} has {free_bytes / 1e6:.0f} MB free, a checkpoint needs about "
            f"{needed_bytes / 1e6:.0f} MB. Set local= (SPOT_LOCAL) to a larger disk of this instance."
        )


def held_bytes(folder: Path) -> int:
    """What the run in `folder` holds: its checkpoints, and the one being staged."""
    held = 0
    for part in (layout.CHECKPOINTS, layout.STAGING):
        for file in (folder / part).rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # the agent of the life before may be pruning
                held += file.stat().st_size if file.is_file() else 0
    return held


def write_durably(path: Path, data: bytes) -> None:
    """Write `data` to `path` and fsync the file; the folder is the caller's."""
    with open(path, "wb", buffering=0) as file:
        write_all(file.fileno(), data)
        os.fsync(file.fileno())


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """os.write until everything is written: one call may write less than it was given."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create_exclusively(target: Path, data: bytes) -> None:
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        if target.read_bytes() != data:
            raise CommitConflictError(f"{target} exists with other content") from None
        return
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy_durably(source: Path, target: Path, on_bytes: OnBytes) -> None:
    with open(source, "rb", buffering=0) as reader, open(target, "wb", buffering=0) as writer:
        for block in blocks(reader):
            write_all(writer.fileno(), block)
            on_bytes(len(block))
        os.fsync(writer.fileno())


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A name next to `target` that was never used: a dead process's file may be a link to a committed one.

    Raises TierError if a newer life of the run swept it before it got its name: trying again then finds that life.
    """
    path = target.with_name(f".tmp-{uuid.uuid4().hex}-{target.name}")
    try:
        yield path
    except FileNotFoundError as error:
        if str(error.filename) != str(path):
            raise
        raise TierError(errno.ENOENT, f"{target} was not written: a newer life swept {path.name}") from error
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, TierError, CorruptCheckpointError):
        raise
    except OSError as error:
        kind = TierDeniedError if error.errno in _DENIED else TierError
        raise kind(error.errno, f"cannot {what}: {error.strerror or error}") from error
