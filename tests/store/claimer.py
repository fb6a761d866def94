"""Claims lives in a process of its own, together with others that start at the same moment."""

from __future__ import annotations

from multiprocessing.synchronize import Barrier
from typing import Any

from spot_core.store import incarnation
from spot_core.store.posix import PosixTier
from spot_core.store.tier import open_tier


def claim_many(
    folders: tuple[str, str], rounds: int, start: Barrier, claimed: Any, storage_options: Any = None
) -> None:
    """Put each number claimed into the queue, one a round; all processes begin each round together."""
    local, remote = PosixTier(folders[0]), open_tier(folders[1], storage_options)
    remote.list("")  # connected before the race
    for _ in range(rounds):
        start.wait(timeout=60)
        claimed.put(incarnation.claim(local, remote, 0.0))
