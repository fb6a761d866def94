"""Drain: bring local commits to the remote tier, newest first, and keep both tiers within their limits.

Local commits are those of the local folder and those that a full disk sent to the overflow in memory.
One checkpoint at a time: verify the local bytes, upload, verify what is stored, and only then create the remote
manifest. The first of a life is read back whole; later ones only where the store does not attest what it holds by a
checksum of its own. A checkpoint that another one pins (the best model) goes before it. Checkpoints that retention
would delete at once are not uploaded: a newer one has made them worthless.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor

from spot_core.errors import CommitConflictError, CorruptCheckpointError, NewerFormatError, TierError
from spot_core.store import catalog, incarnation, layout, resume, retention
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import FileRecord, Manifest
from spot_core.store.overflow import Overflow
from spot_core.store.posix import PosixTier
from spot_core.store.tier import Tier, check_record

logger = logging.getLogger(__name__)

OnProgress = Callable[[CheckpointName, int, int], None]
OnDurable = Callable[[CheckpointName, float], None]


class Drain:
    """The drain of one run from its local to its remote tier, on behalf of one incarnation."""

    def __init__(
        self,
        local: PosixTier,
        remote: Tier,
        *,
        incarnation: int,
        keep_local: int,
        keep_remote: int,
        keep_every: int | None = None,
        overflow: Overflow | None = None,
    ) -> None:
        self._local, self._remote, self._overflow = local, remote, overflow or Overflow(None)
        self._incarnation = incarnation
        self._keep_local, self._keep_remote, self._keep_every = keep_local, keep_remote, keep_every
        self._durable: set[CheckpointName] = set()
        self._completed: set[CheckpointName] = set()
        self._is_remote_listed = False
        self._refused: set[CheckpointName] = set()
        self._pins: dict[CheckpointName, CheckpointName | None] = {}
        self._readable: set[CheckpointName] = set()
        self._newer: set[CheckpointName] = set()
        self._is_local_known = True
        self._has_read_back = False

    @property
    def durable(self) -> frozenset[CheckpointName]:
        return frozenset(self._durable)

    @property
    def newest_durable(self) -> CheckpointName | None:
        return max(self._durable, default=None)

    @property
    def refused(self) -> frozenset[CheckpointName]:
        """Local commits that are not drained: damaged, or another writer's."""
        return frozenset(self._refused)

    def pending(self) -> list[CheckpointName]:
        """Local commits worth uploading, in order of value. Raises TierError."""
        self._list_remote()
        local = sorted(self._here(), reverse=True)
        stay = self._pinned(local) | self._lasting(local)
        worthless = set(
            retention.superseded({*local, *self._durable}, keep=self._keep_remote, durable=self._durable, pinned=stay)
        )
        return [name for name in local if name not in self._durable | self._refused | worthless]

    def _here(self) -> dict[CheckpointName, PosixTier]:
        """Every local commit, with the tier that holds it. Raises TierError."""
        self._overflow.hold()
        tier = self._overflow.tier
        found = dict.fromkeys(catalog.names(tier), tier) if tier is not None else {}
        try:
            found.update(dict.fromkeys(catalog.names(self._local), self._local))
            self._is_local_known = True
        except TierError as error:
            # What is only there may come back: until then nothing that it could refer to is deleted.
            self._is_local_known = False
            if not found and error.errno != errno.ENOTDIR:
                raise
        return found

    def _list_remote(self) -> None:
        # At first use, not at construction: a remote that is down then is retried like at any other time.
        if not self._is_remote_listed:
            self._durable.update(catalog.sound_names(self._remote))
            self._completed.update(catalog.completions(self._remote))
            self._is_remote_listed = True

    def step(
        self, on_progress: OnProgress, on_durable: OnDurable = lambda *_: None
    ) -> tuple[CheckpointName, float] | None:
        """Drain the most valuable pending checkpoint, then delete what it supersedes; None if there is none.

        Returns its name and the seconds from its local commit until it was durable, which on_durable is told at once.
        Raises FencedError, TierError.
        """
        pending = self.pending()
        if not pending:
            self._drain_completions()
            return None
        name = pending[0]
        pinned = self._pin(name)
        if pinned in pending:
            name = pinned
        tier = self._here().get(name)
        if tier is None:
            return self.step(on_progress, on_durable)
        with ThreadPoolExecutor(1) as pool:
            try:
                manifest = catalog.read_manifest(tier, name)
                looking = pool.submit(self._is_wanted, manifest)
                resume.verify(tier, manifest)
            except (CorruptCheckpointError, FileNotFoundError) as error:
                if name not in self._here():
                    logger.debug("local checkpoint %s was deleted to make room before it was drained", name)
                    return self.step(on_progress, on_durable)
                # Never upload what would not restore. The next local commit takes its place.
                self._refused.add(name)
                what = "of a newer format" if isinstance(error, NewerFormatError) else "damaged"
                logger.error("local checkpoint %s is %s and is not drained: %s", name, what, error)
                return self.step(on_progress, on_durable)
        if looking.result():
            self._upload(tier, manifest, on_progress)
        self._durable.add(name)
        seconds = time.time() - manifest.created
        on_durable(name, seconds)
        self.prune()
        return name, seconds

    def _is_wanted(self, manifest: Manifest) -> bool:
        """Whether this life may upload it (FencedError) and an earlier attempt did not get through."""
        incarnation.check_fence(self._remote, self._incarnation)
        return not self._is_on_remote(manifest)

    def _upload(self, local: PosixTier, manifest: Manifest, on_progress: OnProgress) -> None:
        folder, done = layout.checkpoint(manifest.name), 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            on_progress(manifest.name, done, manifest.total_bytes)

        def copy(file: FileRecord) -> None:
            path = f"{folder}/{file.path}"
            try:
                attested = self._remote.upload(local.path(path), path, on_bytes)
                found = attested if attested and self._has_read_back else self._remote.record(path)
                check_record(found, file, f"{self._remote.url}/{folder}")
            except FileNotFoundError as error:
                # Taken by the agent of a newer life: the next attempt meets its fence.
                raise TierError(f"{path} vanished while it was drained: {error}") from error

        on_progress(manifest.name, 0, manifest.total_bytes)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(copy, manifest.files))
        incarnation.check_fence(self._remote, self._incarnation)
        try:
            self._remote.create(layout.manifest(manifest.name), manifest.to_json())
        except CommitConflictError:
            # Same name, other content: only another writer of this incarnation's past can have done that.
            self._refused.add(manifest.name)
            raise
        self._has_read_back = True

    def _is_on_remote(self, manifest: Manifest) -> bool:
        """Whether an earlier attempt got through although its reply was lost: committed files are not written again."""
        try:
            if self._remote.read(layout.manifest(manifest.name)) == manifest.to_json():
                return True
            catalog.read_manifest(self._remote, manifest.name)
            why = ""
        except FileNotFoundError:
            return False
        except NewerFormatError as error:
            why = f": {error}"
        except CorruptCheckpointError as error:
            why = (
                f": {error}. The local copy is whole and stays. When no life of the run is active mend it with: spot "
                f"repair {self._remote.url} --from {self._local.url}"
            )
        self._refused.add(manifest.name)
        raise CommitConflictError(f"{manifest.name} exists in {self._remote.url} with other content{why}")

    def _drain_completions(self) -> None:
        tiers = [tier for tier in (self._overflow.tier, self._local if self._is_local_known else None) if tier]
        ended = {name: steps for tier in tiers for name, steps in catalog.completions(tier).items()}
        for name in (ended.keys() - self._completed) & self._durable:
            incarnation.check_fence(self._remote, self._incarnation)
            catalog.mark_complete(self._remote, name, ended[name])
            self._completed.add(name)

    def prune(self) -> None:
        """Delete what is superseded on both tiers. Only names verified on the remote in this life or listed count."""
        local = self._here()
        self._clear_overflow(local)
        if not self._is_local_known:
            return
        pinned = self._pinned(local)
        lasting = pinned | self._lasting(local)
        # A backlog may be longer than keep_local and still be wanted on the remote, with what it refers to: the remote
        # may be pruned by hand before it gets there.
        waiting = self.pending()
        wanted = pinned.union(waiting, self._pins_of(waiting))
        for tier, keep, stay in ((self._remote, self._keep_remote, lasting), (self._local, self._keep_local, wanted)):
            names = catalog.names(tier)
            # What somebody else put there takes the place of nothing.
            present = [name for name in names if name in self._durable] if tier is self._remote else names
            doomed = retention.superseded(present, keep=keep, durable=self._durable, pinned=stay)
            doomed = [name for name in doomed if self._is_readable(tier, name)]
            retention.delete_checkpoints(tier, doomed)
            if tier is self._remote:
                self._durable -= set(doomed)

    def _clear_overflow(self, local: Collection[CheckpointName]) -> None:
        # Until this life has committed something itself, its trainer may still be loading what it resumed from.
        if any(name.incarnation == self._incarnation for name in {*local, *self._durable}):
            self._overflow.clear(but=self.pending())

    def _is_readable(self, tier: Tier, name: CheckpointName) -> bool:
        """Whether this release can tell what it deletes: what a newer one committed is for that one to delete."""
        if name not in self._readable:
            try:
                catalog.read_manifest(tier, name)
            except NewerFormatError as error:
                if name not in self._newer:
                    self._newer.add(name)
                    logger.warning("checkpoint %s stays where it is: %s", name, error)
                return False
            except (CorruptCheckpointError, FileNotFoundError):
                pass
            self._readable.add(name)
        return True

    def _pinned(self, local: Collection[CheckpointName]) -> set[CheckpointName]:
        """What the checkpoints that stay refer to: kept on either tier, or still to be drained."""
        newest = self.newest_durable
        kept = {*sorted(local)[-self._keep_local :], *sorted(self._durable)[-self._keep_remote :]}
        kept.update(sorted({*local, *self._durable})[-self._keep_remote :])
        kept.update(name for name in local if newest is None or name > newest)
        return self._pins_of(kept)

    def _lasting(self, local: Collection[CheckpointName]) -> set[CheckpointName]:
        """What stays on the remote for good, with what it refers to. On the local tier it stays until it is durable."""
        # A damaged local commit will never be durable: it must not take the place of the one after it.
        milestones = retention.milestones({*local} - self._refused | self._durable, every=self._keep_every)
        return milestones | self._pins_of(milestones)

    def _pins_of(self, names: Iterable[CheckpointName]) -> set[CheckpointName]:
        return {pin for pin in map(self._pin, names) if pin is not None}

    def _pin(self, name: CheckpointName) -> CheckpointName | None:
        tiers: tuple[Tier | None, ...] = (self._local if self._is_local_known else None, self._overflow.tier)
        for tier in (*tiers, self._remote):
            if name in self._pins:
                break
            if tier is None:
                continue
            try:
                self._pins[name] = catalog.read_manifest(tier, name).pins
            except FileNotFoundError:
                continue
            except CorruptCheckpointError:
                if tier is self._remote:
                    self._pins[name] = None  # a milestone stays for good: it is not read again at every look
        return self._pins.get(name)
