"""`spot agent`: drain a run's local folder by hand, or beside a trainer that shares the folder.

Watching, it follows the newest life that was claimed on this folder, and retries a remote that does not answer. A
signal ends it after one last pass, so that a container that is told to stop leaves nothing behind.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from spot_core.agent import opening
from spot_core.agent.drain import Drain
from spot_core.config import absolute_url
from spot_core.errors import CommitUnknownError, ConfigError, CorruptCheckpointError, TierError
from spot_core.store import identity, incarnation, layout, resume
from spot_core.store.overflow import Overflow
from spot_core.store.posix import PosixTier
from spot_core.store.tier import Tier, open_tier

logger = logging.getLogger(__name__)

KEEP_ALL = sys.maxsize
_POLL_S = 1.0
_LONGEST_PAUSE_S = 30.0


@dataclass(slots=True)
class HandDrain:
    """The drain of one run's folder by hand."""

    local: PosixTier
    remote: Tier
    keep_local: int
    keep_remote: int
    keep_every: int | None = None
    _drain: Drain | None = None
    _overflow: Overflow = field(default_factory=lambda: Overflow(None))
    _incarnation: int = 0

    def once(self) -> None:
        """Drain what is there. Raises ConfigError (no run, another run), FencedError, TierError,
        CorruptCheckpointError (a local checkpoint is damaged: the others were drained)."""
        if not self._has_run():
            raise ConfigError(f"{self.local.url} holds no run to drain: there is no {layout.RUN}")
        drain = self._opened()
        self._drain_all(drain)
        self._overflow.remove(self._incarnation)
        if drain.refused:
            names = ", ".join(map(str, sorted(drain.refused)))
            raise CorruptCheckpointError(f"local checkpoint {names} is damaged and was not drained; all others were")
        logger.info("nothing left to drain, newest durable checkpoint: %s", drain.newest_durable or "none yet")

    def watch(self, stop: threading.Event) -> None:
        """Drain whatever is committed until `stop` is set, then once more. Raises what retrying cannot help."""
        failures, reported = 0, ""
        if not self._has_run():
            logger.info("waiting for a run to begin in %s", self.local.url)
        while True:
            is_last = stop.is_set()
            try:
                if self._has_run():
                    self._drain_all(self._opened())
                failures, reported = 0, ""
            except (TierError, CommitUnknownError) as error:
                if is_last or resume.is_final(error):
                    raise
                failures += 1
                if type(error).__name__ != reported:
                    reported = type(error).__name__
                    logger.warning("drain failed and is retried: %s", error)
            if is_last:
                return
            stop.wait(min(_LONGEST_PAUSE_S, _POLL_S * 2**failures) if failures else _POLL_S)

    def _has_run(self) -> bool:
        return identity.read_run(self.local) is not None

    def _opened(self) -> Drain:
        """The drain on behalf of the newest life of the local folder."""
        number = incarnation.newest(self.local)
        if self._drain is None or number != self._incarnation:
            self.remote.list("")  # first, because it tells a missing bucket from an empty one
            identity.check_same_run(self.local, identity.read_run(self.remote))
            incarnation.check_fence(self.remote, number)
            self._incarnation = number
            self._overflow = opening.overflow_of(self.local, self.remote)
            self._drain = Drain(
                self.local,
                self.remote,
                incarnation=number,
                keep_local=self.keep_local,
                keep_remote=self.keep_remote,
                keep_every=self.keep_every,
                overflow=self._overflow,
            )
        return self._drain

    def _drain_all(self, drain: Drain) -> None:
        while (drained := drain.step(lambda *_: None)) is not None:
            logger.info("checkpoint %s is durable in %s", drained[0], self.remote.url)


def open_drain(
    folder: Path,
    url: str,
    options: Mapping[str, Any],
    *,
    keep_local: int | None,
    keep_remote: int | None,
    keep_every: int | None = None,
    keys: tuple[str, ...] = (),
) -> HandDrain:
    """folder: the run's local folder, or the one above, shared by runs.

    keep_local, keep_remote: None deletes nothing. keep_every: what stays on the remote besides. keys: those that its
    manifests must be signed with, if any.
    """
    remote = open_tier(absolute_url(url), options, keys)
    below = folder / remote.url.rpartition("/")[2]
    place = below if not (folder / layout.RUN).exists() and (below / layout.RUN).exists() else folder
    local = PosixTier(place, remote.signing)
    if isinstance(remote, PosixTier) and remote.root.resolve() == local.root.resolve():
        raise ConfigError(f"{local.url} is both the local folder and the remote")
    return HandDrain(local, remote, keep_local or KEEP_ALL, keep_remote or KEEP_ALL, keep_every)


def stop_on_signals() -> threading.Event:
    """Set at the first SIGTERM or SIGINT; the second one acts as usual."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return stop
