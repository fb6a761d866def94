"""What a remote holds, as far as opening a run has to know before it writes anything.

Each thing asked for is a round trip: most are asked for while the trainer, which reads a base, does not know yet what
to ask the agent.
"""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from spot_core.agent.lives import newest_durable
from spot_core.bounded import begin
from spot_core.errors import CorruptCheckpointError
from spot_core.store import catalog, identity
from spot_core.store.catalog import Recent
from spot_core.store.tier import ObjectStore, Tier

# An early look that is older is not used; one that is not done is waited for so long.
_LASTS_S = 5.0
_ENDS_S = 1.0


@dataclass(frozen=True, slots=True)
class Look:
    """What a remote was seen to hold. stored: its run.json, None if there is none."""

    recent: Recent
    stored: dict[str, Any] | None


def look_at(remote: Tier) -> Look:
    """Look now. Raises TierError."""
    # Listing first: on an object store it is what tells a missing bucket from an empty run.
    recent = catalog.recent(remote, lambda: newest_durable(remote))
    return Look(recent, identity.read_run(remote))


class EarlyLook:
    """A look in the background, with the newest manifest. What is there may change before the run is opened.

    So it may after any look: what a life before this one commits meanwhile is found after the claim.
    """

    def __init__(self, remote: Tier) -> None:
        self._began = time.monotonic()
        self._answer: Future[Look] | None = begin(partial(_look_early, remote))

    def take(self) -> Look | None:
        """What was seen, once; None if it failed, is old or takes long: the next look tells what is the matter."""
        answer, self._answer = self._answer, None
        if answer is None or time.monotonic() - self._began > _LASTS_S or not wait([answer], _ENDS_S).done:
            return None
        return answer.result() if answer.exception() is None else None


def _look_early(remote: Tier) -> Look:
    prepare(remote)  # or wait until that is done: of two that begin at once each would make clients
    look = look_at(remote)
    with contextlib.suppress(CorruptCheckpointError, FileNotFoundError):  # told when it is to be restored
        for name in look.recent.names[:1]:
            return replace(look, recent=replace(look.recent, manifest=catalog.read_manifest(remote, name)))
    return look


def prepare(remote: Tier) -> None:
    """Look up credentials and make clients, without a request to the store. What is wrong the first request tells."""
    if isinstance(remote, ObjectStore):
        with contextlib.suppress(Exception):
            remote.prepare()
