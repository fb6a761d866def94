"""Opening a run: check the place, restore, claim. The agent does it so that the trainer never opens a remote.

Order: nothing is written before the identity was checked and a checkpoint verified, and the claim is the first
write to the remote, so that a wrong folder or a missing permission is an error that leaves no trace.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import stamina

from spot_core.agent.lives import Life, read_lives
from spot_core.errors import ConfigError, CorruptCheckpointError, TierDeniedError, TierError
from spot_core.store import identity as identities
from spot_core.store import incarnation, resume, retention
from spot_core.store.identity import RunIdentity
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.posix import PosixTier
from spot_core.store.resume import OnProgress, Restored
from spot_core.store.tier import ObjectStore, Tier

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Opened:
    """An opened run. incarnation is None if training ended at the restored checkpoint: a finished run claims
    nothing. max_steps: what it was to last then."""

    incarnation: int | None
    restored: Restored | None
    pin: CheckpointName | None
    lives: list[Life]
    max_steps: int | None = None


def open_run(
    local: PosixTier,
    remote: Tier,
    identity: RunIdentity,
    *,
    is_resumed: bool,
    started: float,
    timeout_s: float,
    on_progress: OnProgress,
) -> Opened:
    """Check, restore and claim, retrying an unreachable remote for `timeout_s` seconds.

    Raises ConfigError (another run lives here), TierDeniedError, TierError (unreachable to the end),
    CorruptCheckpointError (checkpoints exist, none is valid).
    """
    try:
        return _retried(
            timeout_s, lambda: _open_once(local, remote, identity, is_resumed, started, on_progress=on_progress)
        )
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
    """The newest checkpoint's manifest, wherever it is; its files are not verified. Raises TierError."""
    found = [(name, tier) for tier in (local, remote) for name in resume.names(tier)]
    if not found:
        return None
    name, tier = max(found, key=lambda each: each[0])
    return resume.read_manifest(tier, name)


def claim(local: PosixTier, remote: Tier, identity: RunIdentity, *, started: float, timeout_s: float) -> int:
    """Claim a life of an opened run that looked complete but is to be trained further."""
    return _retried(timeout_s, lambda: _claim_once(local, remote, identity, started))


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
    identity: RunIdentity,
    is_resumed: bool,
    started: float,
    *,
    on_progress: OnProgress,
) -> Opened:
    # Listing first: on an object store it is what tells a missing bucket from an empty run.
    newest = _newest_name(local, remote)
    stored = identities.read_run(remote)
    identities.check_identity(stored, identity, remote.url)
    identities.check_same_run(local, stored)
    if newest is not None and stored is None:
        raise ConfigError(f"{remote.url} holds checkpoints but no run.json: it is not a run's folder")
    restored = resume.newest_valid(local, remote, on_progress) if is_resumed else None
    pin = _fetch_pin(restored, local, remote, on_progress)
    ended = {**resume.completions(local), **resume.completions(remote)}
    if restored is not None and restored.manifest.name in ended:
        return Opened(None, restored, pin, [], ended[restored.manifest.name])
    number = _claim_once(local, remote, identity, started)
    if is_resumed and _newest_name(local, remote) != newest:
        # The life before this one committed once more before it saw the claim.
        restored = resume.newest_valid(local, remote, on_progress)
        pin = _fetch_pin(restored, local, remote, on_progress)
    retention.sweep_orphans(local, resume.names(local), before_incarnation=number)
    # The agent of the life right before may be between its last look at the fence and its manifest: what looks like
    # its orphan is left to the next life.
    retention.sweep_orphans(remote, resume.names(remote), before_incarnation=number - 1)
    if isinstance(remote, ObjectStore):
        remote.sweep_uploads(before_incarnation=number)
    lives = [life for life in read_lives(remote) if life.incarnation < number]
    return Opened(number, restored, pin, lives)


def _claim_once(local: PosixTier, remote: Tier, identity: RunIdentity, started: float) -> int:
    identities.create_run(local, remote, identity, started)
    number = incarnation.claim(local, remote, started)
    if isinstance(remote, ObjectStore) and remote.overwrites:
        # A racing first life may have written its run.json over ours.
        identities.agree(local, remote, identity)
    return number


def _newest_name(local: PosixTier, remote: Tier) -> CheckpointName | None:
    return max([*resume.names(remote), *resume.names(local)], default=None)


def _fetch_pin(
    restored: Restored | None, local: PosixTier, remote: Tier, on_progress: OnProgress
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
            here=name in resume.names(local),
            there=name in resume.names(remote),
            on_progress=on_progress,
        )
    except CorruptCheckpointError as error:
        logger.warning("the best model, checkpoint %s, could not be restored: %s", name, error)
        return None
    return name
