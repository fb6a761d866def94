"""A drain with small limits, and how the agent works through it."""

from __future__ import annotations

from spot_core.agent.drain import Drain
from spot_core.errors import TierError
from spot_core.store.layout import CheckpointName
from spot_core.store.overflow import Overflow
from spot_core.store.posix import PosixTier
from spot_core.store.tier import Tier

ONE, TWO, THREE, FOUR = (CheckpointName(1, step) for step in (10, 20, 30, 40))


def make_drain(
    local: PosixTier,
    remote: Tier,
    *,
    number: int = 1,
    keep_local: int = 2,
    keep_remote: int = 2,
    keep_every: int | None = None,
    overflow: Overflow | None = None,
) -> Drain:
    return Drain(
        local,
        remote,
        incarnation=number,
        keep_local=keep_local,
        keep_remote=keep_remote,
        keep_every=keep_every,
        overflow=overflow,
    )


def drain_all(drain: Drain, *, patience: int = 0) -> list[CheckpointName]:
    """Names in the order they became durable; like the agent, tries again after up to `patience` failures."""
    drained = []
    while True:
        try:
            result = drain.step(lambda *_: None)
        except TierError:
            patience -= 1
            if patience < 0:
                raise
            continue
        if result is None:
            return drained
        drained.append(result[0])
