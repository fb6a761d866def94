"""The termination signals: a handler that only sets a flag, read at step boundaries.

Handlers run between two byte codes of the main thread, possibly in the middle of a backward pass: saving there
would store a torn state.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)


class SignalWatcher:
    """Remembers when the signals arrived. Puts back at the end the handlers that were there before, unless somebody
    else has taken a signal over meanwhile."""

    def __init__(self) -> None:
        self._previous: dict[signal.Signals, Any] = {}
        self._chained: dict[signal.Signals, Any] = {}
        self.noticed_at: float | None = None
        self.received: set[signal.Signals] = set()

    def install(self, chained: Mapping[signal.Signals, Any] | None = None) -> None:
        """Take over SIGTERM, or the signals of `chained`, each with the handler that is called after ours.

        Without `chained` that is the handler that was there. Outside the main thread Python forbids to watch
        signals, which is told once.
        """
        if chained is None:
            chained = {signal.SIGTERM: signal.getsignal(signal.SIGTERM)}
        self._chained = dict(chained)
        for signum in self._chained:
            try:
                self._previous[signum] = signal.signal(signum, self._on_signal)
            except ValueError:
                logger.warning(
                    "not in the main thread: %s is not watched, a preemption will look like a kill", signum.name
                )

    def uninstall(self) -> None:
        for signum, previous in self._previous.items():
            if signal.getsignal(signum) == self._on_signal:
                signal.signal(signum, previous if previous is not None else signal.SIG_DFL)
        self._previous.clear()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.noticed_at is None:
            self.noticed_at = time.monotonic()
        self.received.add(signal.Signals(signum))
        chained = self._chained.get(signal.Signals(signum))
        if callable(chained):
            chained(signum, frame)
