"""The overflow: a folder in memory for checkpoints that the local disk cannot hold, on their way to the remote.

One for each run and user, below /dev/shm (or the tmpfs that SPOT_OVERFLOW names; empty turns it off), private to the
user. What lies there outlives the processes, not the boot, and is deleted as soon as it is durable. Nothing is begun
there that would leave less than a tenth of the memory free, or take more than half of what the file system has: the
trainer must not be killed for a checkpoint.
Every agent that uses the folder shares a lock on it, and deletes only while it is the only one: the life before may
still be draining what the next one resumes from.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from blake3 import blake3

from spot_core.errors import TierError
from spot_core.store import catalog, layout, memory, volume
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.store.signing import UNSIGNED, Signing
from spot_core.store.tier import Tier

PLACE = "SPOT_OVERFLOW"
_DEFAULT_PLACE = "/dev/shm"
# Of all memory, what must stay free.
_RESERVE_SHARE = 0.1
# Of what is free in the file system, what a checkpoint may take: workers of data loaders die of a full /dev/shm.
_FREE_SHARE = 0.5
# One that is being drained and a newer one.
_MOST = 2


class Overflow:
    """The overflow of one run. folder: None where there is no memory to use; it need not exist.

    Threads may share it. `hold` and what deletes are the agent's.
    """

    def __init__(self, folder: Path | None, signing: Signing = UNSIGNED) -> None:
        self.folder, self._signing = folder, signing
        self._lock: int | None = None

    @classmethod
    def of(cls, remote: Tier, run_id: str) -> Overflow:
        """That of the run on `remote`."""
        return cls.at(remote.url, run_id, remote.signing)

    @classmethod
    def at(cls, url: str, run_id: str, signing: Signing) -> Overflow:
        """That of the run at a remote's URL. By this name a next life finds it with another local folder, too."""
        place = _place()
        digest = blake3(f"{os.getuid()}\n{run_id}\n{url}".encode()).hexdigest()[:24]
        return cls(place / f"spot-{digest}" if place is not None else None, signing)

    @property
    def tier(self) -> PosixTier | None:
        """The folder as a tier, None if it does not exist or is not this user's alone."""
        if self.folder is None:
            return None
        try:
            found = os.lstat(self.folder)
        except OSError:
            return None
        is_private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
        return PosixTier(self.folder, self._signing) if is_private else None

    def names(self) -> list[CheckpointName]:
        """What is committed there, newest first."""
        tier = self.tier
        return catalog.names(tier) if tier is not None else []

    def make(self) -> PosixTier:
        """The folder, made if need be. Raises TierError."""
        if self.folder is None:
            raise TierError(errno.ENOENT, f"there is no file system in memory ({PLACE})")
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.folder, 0o700)
        except OSError as error:
            raise TierError(error.errno, f"cannot create {self.folder}: {error.strerror}") from error
        if (tier := self.tier) is None:
            raise TierError(errno.EPERM, f"{self.folder} is not a folder of this user alone")
        return tier

    def make_room(self, expected_bytes: int) -> PosixTier:
        """The folder, with room for a checkpoint of about that size. Raises TierError (ENOSPC if it is short)."""
        if self.folder is None:
            return self.make()
        needed_bytes, free_bytes = volume.needed_bytes(expected_bytes), room_bytes()
        if len(self.names()) >= _MOST:
            raise TierError(errno.ENOSPC, f"{self.folder} holds {_MOST} checkpoints that are not drained yet")
        if free_bytes < needed_bytes:
            raise TierError(
                errno.ENOSPC,
                f"{volume.megabytes(needed_bytes)} needed, {volume.megabytes(free_bytes)} of memory to spare",
            )
        return self.make()

    def hold(self) -> None:
        """Keep the agents of other lives from deleting anything there while this process lives."""
        if not self._is_held():
            self._let_go()
            if self.tier is not None and self.folder is not None:
                with contextlib.suppress(OSError):
                    self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
                    fcntl.flock(self._lock, fcntl.LOCK_SH)

    def clear(self, *, but: Collection[CheckpointName]) -> None:
        """Delete the checkpoints that are no longer needed there; `but` stay. Not while another agent holds it."""
        tier = self.tier
        doomed = [name for name in catalog.names(tier) if name not in but] if tier is not None else []
        if tier is None or not doomed:
            return
        with self._alone() as is_alone:
            if not is_alone:
                return
            # The mark of completion stays: it may not have been drained with its checkpoint.
            for name in doomed:
                tier.delete([layout.manifest(name)])
                tier.delete([layout.checkpoint(name)])
            # What a trainer linked in order to load it keeps the memory of deleted files.
            loaded = [entry for entry in tier.list(layout.STAGING) if CheckpointName.parse(entry) is None]
            tier.delete(f"{layout.STAGING}/{entry}" for entry in loaded)

    def remove(self, number: int, *, but: Collection[CheckpointName] = (), is_journal_kept: bool = False) -> bool:
        """Life `number` has ended: give back all memory that it and lives before it took, but for these checkpoints.

        Returns whether that was done; not while another agent holds it.
        """
        tier = self.tier
        if tier is None:
            return True
        folders = [layout.MANIFESTS, layout.CHECKPOINTS, layout.STAGING, *([] if is_journal_kept else [layout.JOURNAL])]
        with self._alone() as is_alone:
            for folder in folders if is_alone else ():
                for entry in os.listdir(tier.path(folder)) if tier.path(folder).is_dir() else ():
                    name = CheckpointName.parse(entry.partition(".")[0])
                    owner = name.incarnation if name is not None else _number(entry)
                    if owner <= number and (name is None or name not in but):
                        tier.delete([f"{folder}/{entry}"])
                with contextlib.suppress(OSError):
                    tier.path(folder).rmdir()
            with contextlib.suppress(OSError):
                tier.root.rmdir()  # unless something is left
        self._let_go()
        return is_alone

    def _is_held(self) -> bool:
        try:
            return (
                self._lock is not None
                and self.folder is not None
                and os.path.samestat(os.fstat(self._lock), os.lstat(self.folder))
            )
        except OSError:
            return False

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether no other agent holds it; none can begin to before the block ends."""
        self.hold()
        if self._lock is None:
            yield False
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_alone = True
        except OSError:
            is_alone = False
        try:
            yield is_alone
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_SH)

    def _let_go(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def room_bytes() -> int:
    """How large a checkpoint in memory may be now; 0 where there is no such place."""
    place = _place()
    if place is None:
        return 0
    spare = memory.available_bytes() - int(_RESERVE_SHARE * memory.total_bytes())
    try:
        return max(0, min(spare, int(_FREE_SHARE * shutil.disk_usage(place).free)))
    except OSError:
        return 0


def _place() -> Path | None:
    text = os.environ.get(PLACE, _DEFAULT_PLACE)
    place = Path(text).absolute()
    if not text or not os.access(place, os.W_OK | os.X_OK) or volume.file_system(place) != "tmpfs":
        return None
    return place


def _number(entry: str) -> int:
    """The life that a journal's file belongs to; anything else belongs to nobody."""
    stem = entry.partition(".")[0]
    return int(stem) if stem.isdigit() else 0
