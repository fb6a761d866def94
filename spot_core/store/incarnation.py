"""One writer per run: each life claims a number with a create-only write, and a newer claim fences the older."""

from __future__ import annotations

import json
import os
import platform
import uuid
from pathlib import Path

from spot_core.errors import CommitConflictError, FencedError
from spot_core.store import layout
from spot_core.store.tier import Tier


def newest(tier: Tier) -> int:
    """The highest claimed incarnation, 0 if none."""
    numbers = (layout.numbered(entry) for entry in tier.list(layout.INCARNATIONS))
    return max((number for number in numbers if number is not None), default=0)


def claim(local: Tier, remote: Tier, started: float) -> int:
    """Claim the next incarnation on both tiers and return its number. Of racing claims each gets its own."""
    number = max(newest(remote), newest(local)) + 1
    while True:
        body = {
            "incarnation": number,
            "host": platform.node(),
            "pid": os.getpid(),
            "boot_id": boot_id(),
            "started": started,
            "token": uuid.uuid4().hex,
        }
        data = (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()
        try:
            remote.create(layout.incarnation(number), data)
            local.create(layout.incarnation(number), data)
            return number
        except CommitConflictError:
            number += 1


def check_fence(tier: Tier, number: int) -> None:
    """Raise FencedError if `tier` shows a newer life than `number`."""
    seen = newest(tier)
    if seen > number:
        raise FencedError(
            f"incarnation {number} is fenced: incarnation {seen} of this run exists in {tier.url}. This process "
            "stops and commits nothing more; what it had committed stays. If the newer one was started by "
            "mistake, stop it and run the same command again."
        )


def boot_id() -> str:
    """Identity of this boot of this machine, empty where the system gives none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
