"""One writer per run: each life claims a number with a create-only write, and a newer claim fences the older."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
import uuid
from collections.abc import Callable

from spot_core.errors import CommitConflictError, ConfigError, FencedError, TierError
from spot_core.store import layout
from spot_core.store.tier import ObjectStore, Tier

logger = logging.getLogger(__name__)

# How long a claim must stand in a store that overwrites, and the longest that it may take from its look to its write:
# a slower one may have been written over a claim that already stood.
SETTLE_S = 3.0
# A store that is always slower than that must not keep a run from starting.
_LATE_CLAIMS = 5


def newest(tier: Tier) -> int:
    """The highest claimed incarnation, 0 if none."""
    numbers = (layout.numbered(entry) for entry in tier.list(layout.INCARNATIONS))
    return max((number for number in numbers if number is not None), default=0)


def claim(local: Tier, remote: Tier, started: float, *, wait: Callable[[float], None] = time.sleep) -> int:
    """Claim the next incarnation on both tiers and return its number. Of racing claims each gets its own."""
    is_told, late = False, 0
    looked = time.monotonic()
    number = max(newest(remote), newest(local)) + 1
    while True:
        if number > layout.LAST_INCARNATION:
            raise ConfigError(
                f"{remote.url}/{layout.incarnation(layout.LAST_INCARNATION)} is the last life a run can have, and not "
                "by training: somebody else wrote it. Nothing was written. Remove it, or give the run another name."
            )
        body = {
            "incarnation": number,
            "host": platform.node(),
            "pid": os.getpid(),
            "started": started,
            "token": uuid.uuid4().hex,
        }
        data = (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()
        try:
            remote.create(layout.incarnation(number), data)
            if isinstance(remote, ObjectStore) and not remote.refuses_overwrite(layout.incarnation(number), data):
                if not is_told:
                    logger.warning(_OVERWRITES, remote.url, SETTLE_S)
                    is_told = True
                if time.monotonic() - looked > SETTLE_S and late < _LATE_CLAIMS:
                    late += 1
                    raise CommitConflictError(f"{remote.url}/{layout.incarnation(number)} was written too late")
                wait(SETTLE_S)
                _check_stands(remote, number, data)
            local.create(layout.incarnation(number), data)
            return number
        except CommitConflictError:
            looked = time.monotonic()
            number = max(number, newest(remote)) + 1


_OVERWRITES = (
    "this store does not refuse to overwrite: %s. Checkpoints are safe, but of two jobs that are started for this run "
    "at the same moment only the check %.0f s after the claim stops one. Start one at a time, or use a store with "
    "conditional writes (If-None-Match)."
)


def _check_stands(tier: Tier, number: int, data: bytes) -> None:
    """Raise CommitConflictError if another claim was written over this one, TierError if it cannot be seen."""
    path = layout.incarnation(number)
    try:
        found = tier.read(path)
    except FileNotFoundError as error:
        raise TierError(f"{tier.url}/{path} was written and is not there: {error}") from error
    if found != data:
        raise CommitConflictError(f"{tier.url}/{path} was claimed by another")
    if newest(tier) < number:
        # The fence is found by listing: a claim that is not listed would protect nothing.
        raise TierError(f"{tier.url}/{path} was written and is not listed")


def check_fence(tier: Tier, number: int) -> None:
    """Raise FencedError if `tier` shows a newer life than `number`."""
    seen = newest(tier)
    if seen > number:
        raise FencedError(
            f"incarnation {number} is fenced: incarnation {seen} of this run exists in {tier.url}. This process "
            "stops and commits nothing more; what it had committed stays. If the newer one was started by "
            "mistake, stop it and run the same command again."
        )
