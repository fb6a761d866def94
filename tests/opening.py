"""Opening a run as its agent does, without one."""

from __future__ import annotations

from spot_core.agent import opening
from spot_core.agent.look import EarlyLook
from spot_core.agent.opening import Opened
from spot_core.store.identity import RunIdentity, read_run
from spot_core.store.overflow import Overflow
from spot_core.store.posix import PosixTier
from spot_core.store.tier import Tier

IDENTITY = RunIdentity("testing", {"batch": 4})


def open_run(
    local: PosixTier,
    remote: Tier,
    early: EarlyLook | None = None,
    *,
    identity: RunIdentity = IDENTITY,
    is_resumed: bool = True,
    started: float = 1.0,
) -> Opened:
    """What a life finds that begins at `started`. Raises what opening raises."""
    return opening.open_run(
        local,
        remote,
        identity,
        is_resumed=is_resumed,
        started=started,
        timeout_s=60.0,
        on_progress=lambda *_: None,
        early=early,
    )


def overflow_of(remote: Tier) -> Overflow:
    """Where the lives of the run on this remote pass a full disk by."""
    stored = read_run(remote)
    assert stored is not None
    return Overflow.of(remote, stored["run_id"])
