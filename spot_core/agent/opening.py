"""Opening a run: check the place, restore, claim. The agent does it so that the trainer never opens a remote.

Order: nothing is written before the identity was checked and a checkpoint verified, and the claim is the first
write to the remote, so that a wrong folder or a missing permission is an error that leaves no trace.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import stamina

from spot_core.agent.drain import Drain
from spot_core.agent.lives import Life, read_lives
from spot_core.agent.look import EarlyLook, Look, look_at
from spot_core.bounded import begin
from spot_core.errors import (
    AgentError,
    ConfigError,
    CorruptCheckpointError,
    FencedError,
    SpotError,
    TierDeniedError,
    TierError,
    is_full,
)
from spot_core.store import catalog, incarnation, resume, retention, volume
from spot_core.store import identity as identities
from spot_core.store.catalog import Recent
from spot_core.store.identity import RunIdentity
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.overflow import Overflow
from spot_core.store.posix import PosixTier, check_usable
from spot_core.store.resume import FindRoom, OnProgress, Restored
from spot_core.store.tier import ObjectStore, Tier

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Opened:
    """An opened run. incarnation is None if training ended at the restored checkpoint: a finished run claims
    nothing. max_steps: what it was to last then. overflow: of the run, where a checkpoint may have been restored to."""

    incarnation: int | None
    restored: Restored | None
    pin: CheckpointName | None
    lives: list[Life]
    max_steps: int | None = None
    overflow: Overflow = field(default_factory=lambda: Overflow(None))


def open_run(
    local: PosixTier,
    remote: Tier,
    identity: RunIdentity,
    *,
    is_resumed: bool,
    started: float,
    timeout_s: float,
    on_progress: OnProgress,
    is_wanted: Callable[[], bool] = lambda: True,
    early: EarlyLook | None = None,
) -> Opened:
    """Check, restore and claim, retrying an unreachable remote for `timeout_s` seconds.

    is_wanted: asked right before the claim, which would fence a life that began meanwhile. early: a look at the remote
    that has begun.
    Raises ConfigError (another run lives here, the local folder has no room), TierDeniedError, TierError (unreachable
    to the end), CorruptCheckpointError (checkpoints exist, none is valid).
    """

    def attempt() -> Opened:
        try:
            look = (early.take() if early is not None else None) or look_at(remote)
            return _open_once(local, remote, look, identity, is_resumed, started, is_wanted, on_progress=on_progress)
        except TierError as error:
            if local.root.exists():
                check_usable(local.root, 0)  # what is wrong with the local folder must not be blamed on the remote
            if is_full(error):
                raise ConfigError(
                    f"a disk or a quota is full: {error.strerror or error}. Training was not started and nothing was "
                    "deleted. Free space there, then run the same command again."
                ) from error
            raise

    try:
        return _retried(timeout_s, attempt)
    except TierError as error:
        if isinstance(error, TierDeniedError):
            raise TierDeniedError(
                f"{remote.url} refuses: {error.strerror or error}. Training was not started and nothing was deleted. "
                "This machine needs to list, read, write and delete there: check bucket, role and credentials."
            ) from error
        raise TierError(
            f"{remote.url} could not be reached for {timeout_s:.0f} s: {error}. Training was not started, because a "
            "fresh start would throw away what may be stored there; nothing was deleted. Check the network, the "
            "URL and the credentials, then run the same command again."
        ) from error


def newest_manifest(local: PosixTier, remote: Tier) -> Manifest | None:
    """The newest manifest that can be read, wherever it is; its files are not verified. Raises TierError."""
    found = [(name, tier) for tier in (local, remote) for name in catalog.names(tier)]
    for name, tier in sorted(found, key=lambda each: each[0], reverse=True):
        with contextlib.suppress(CorruptCheckpointError, FileNotFoundError):
            return catalog.read_manifest(tier, name)
    return None


def claim(local: PosixTier, remote: Tier, identity: RunIdentity, *, started: float, timeout_s: float) -> int:
    """Claim a life of an opened run that looked complete but is to be trained further."""
    return _retried(timeout_s, lambda: _claim_once(local, remote, identity, started))


def drain_end(local: PosixTier, remote: Tier, drain: Drain, opened: Opened, *, timeout_s: float) -> None:
    """Bring the end of a finished run to the remote, if trainer and agent were lost before it got there.

    A finished run gets no life and so no agent: without this it would stay on this disk. Raises TierError.
    """
    finished = opened.restored.manifest.name if opened.incarnation is None and opened.restored is not None else None
    if finished is None or catalog.completion(remote, finished) is not None:
        return

    def drain_all() -> None:
        while drain.step(lambda *_: None) is not None:
            pass

    try:
        _retried(timeout_s, drain_all)
    except FencedError as error:
        logger.warning("the end of training, %s, stays in %s: %s", finished, local.url, error)
    else:
        logger.warning("the end of training, %s, had not been drained; it is durable in %s now", finished, remote.url)


_T = TypeVar("_T")


def _retried(timeout_s: float, operation: Callable[[], _T]) -> _T:
    retries = stamina.retry_context(
        on=lambda error: isinstance(error, Exception) and not resume.is_final(error),
        attempts=None,
        timeout=timeout_s,
        wait_initial=0.5,
        wait_max=10.0,
    )
    for attempt in retries:
        with attempt:
            return operation()
    raise AssertionError("stamina re-raises the last error")


def _open_once(
    local: PosixTier,
    remote: Tier,
    look: Look,
    identity: RunIdentity,
    is_resumed: bool,
    started: float,
    is_wanted: Callable[[], bool],
    *,
    on_progress: OnProgress,
) -> Opened:
    recent, stored = look.recent, look.stored
    identities.check_identity(stored, identity, remote.url)
    identities.check_same_run(local, stored)
    if stored is None and (recent.names or catalog.names(local)):
        raise ConfigError(f"{remote.url} holds checkpoints but no run.json: it is not a run's folder")
    overflow = Overflow.of(remote, stored["run_id"]) if stored is not None else Overflow(None)
    overflow.hold()  # before the look at what is there
    near = _near(local, overflow)
    newest = max([*recent.names, *(name for tier in near for name in catalog.names(tier))], default=None)
    restored = _restore(local, overflow, remote, on_progress, recent) if is_resumed else None
    _tell_unchecked(restored, remote)
    pin = _fetch_pin(restored, local, overflow, remote, on_progress)
    if restored is not None:
        ends = (catalog.completion(tier, restored.manifest.name) for tier in (remote, *near))
        end = next(filter(None, ends), None)
        if end is not None:
            return Opened(None, restored, pin, read_lives(remote), end.max_steps, overflow)
    if not is_wanted():
        raise AgentError("the trainer ended before its life was claimed: nothing was claimed")
    reading = begin(partial(read_lives, remote))
    number = _claim_once(local, remote, identity, started)
    if is_resumed and any(catalog.has_newer(tier, newest) for tier in (remote, *near)):
        # The life before this one committed once more before it saw the claim.
        restored = _restore(local, overflow, remote, on_progress)
        pin = _fetch_pin(restored, local, overflow, remote, on_progress)
    if stored is None:
        overflow = overflow_of(local, remote)
    for tier in _near(local, overflow):
        retention.sweep_orphans(tier, catalog.names(tier), before_incarnation=number)
    lives = [life for life in reading.result() if life.incarnation < number]
    return Opened(number, restored, pin, lives, overflow=overflow)


def sweep_remote(remote: Tier, number: int) -> None:
    """Delete what crashes of the lives before `number` left on the remote; that life must not drain meanwhile.

    No part of opening: training need not wait for requests that free space in a bucket. Raises TierError.
    """
    # The agent of the life right before may be between its last look at the fence and its manifest: what looks like
    # its orphan is left to the next life.
    retention.sweep_orphans(remote, catalog.names(remote), before_incarnation=number - 1)
    if isinstance(remote, ObjectStore):
        remote.sweep_uploads(before_incarnation=number)


def overflow_of(local: PosixTier, remote: Tier) -> Overflow:
    """The overflow of the run that `local` belongs to; none if its folder is gone."""
    stored = identities.read_run(local)
    return Overflow.of(remote, stored["run_id"]) if stored is not None else Overflow(None)


def clear_finished(overflow: Overflow, local: PosixTier, remote: Tier) -> None:
    """Give back the memory that the lives of a finished run left taken; what is not durable stays."""
    try:
        newest = max(catalog.sound_names(remote), default=None)
        kept = [name for name in overflow.names() if newest is None or name > newest]
        overflow.remove(incarnation.newest(local), but=kept)
    except (SpotError, OSError) as error:
        logger.debug("%s not cleared: %s", overflow.folder, error)


def _near(local: PosixTier, overflow: Overflow) -> list[PosixTier]:
    return [tier for tier in (local, overflow.tier) if tier is not None]


def _restore(
    local: PosixTier, overflow: Overflow, remote: Tier, on_progress: OnProgress, recent: Recent | None = None
) -> Restored | None:
    find_room, near = _room_for(local, overflow, remote), overflow.tier
    return resume.newest_valid(local, remote, on_progress, overflow=near, find_room=find_room, recent=recent)


def _room_for(local: PosixTier, overflow: Overflow, remote: Tier) -> FindRoom:
    """Where a download has room. Local copies that are damaged or superseded go first, if they are durable."""

    def find(manifest: Manifest) -> PosixTier:
        if volume.has_room(local, manifest.total_bytes):
            return local
        durable = set(catalog.sound_names(remote))  # reads every manifest there
        pinned = {manifest.pins} if manifest.pins is not None else set()
        try:
            volume.make_room(local, manifest.total_bytes, durable=durable, pinned=pinned, replaced=manifest.name)
            return local
        except TierError as full:
            try:
                tier = overflow.make_room(manifest.total_bytes)
            except TierError as short:
                raise ConfigError(
                    f"checkpoint {manifest.name} of {remote.url} cannot be restored: {full.strerror}; nor is there "
                    f"room in memory: {short.strerror}. Training was not started. The checkpoint is on the remote; "
                    "here only copies of what is there were deleted. Free space or set local= (SPOT_LOCAL) to a larger "
                    "disk of this instance, then run the same command again."
                ) from full
            logger.warning("%s: checkpoint %s is restored to memory (%s)", full.strerror, manifest.name, tier.url)
            return tier

    return find


def _tell_unchecked(restored: Restored | None, remote: Tier) -> None:
    if restored is not None and restored.manifest.is_signed and not remote.signing.keys:
        logger.warning(
            "the checkpoints of %s are signed, and this life has no key: their digests are verified, their signatures "
            "are not, and what it commits is not signed, so that a later life with the key refuses it. Set "
            "SPOT_SIGNING_KEY or signing_key_file",
            remote.url,
        )


def _claim_once(local: PosixTier, remote: Tier, identity: RunIdentity, started: float) -> int:
    identities.create_run(local, remote, identity, started)
    number = incarnation.claim(local, remote, started)
    if isinstance(remote, ObjectStore) and remote.overwrites:
        # A racing first life may have written its run.json over ours.
        identities.agree(local, remote, identity)
    return number


def _fetch_pin(
    restored: Restored | None, local: PosixTier, overflow: Overflow, remote: Tier, on_progress: OnProgress
) -> CheckpointName | None:
    """Bring the checkpoint that the restored one refers to; a run goes on without it, and says so."""
    manifest: Manifest | None = restored.manifest if restored else None
    if manifest is None or manifest.pins is None:
        return None
    name = manifest.pins
    try:
        resume.fetch(
            name,
            local,
            remote,
            here=catalog.has(local, name),
            there=catalog.has(remote, name),
            overflow=overflow.tier if name in overflow.names() else None,
            find_room=_room_for(local, overflow, remote),
            on_progress=on_progress,
        )
    except CorruptCheckpointError as error:
        logger.warning("the best model, checkpoint %s, could not be restored: %s", name, error)
        return None
    return name
