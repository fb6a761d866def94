"""The termination signal: a handler that only sets a flag, read at step boundaries.

Handlers run between two byte codes of the main thread, possibly in the middle of a backward pass: saving there
would store a torn state.
"""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)


class SignalWatcher:
    """Remembers when SIGTERM arrived. Chains to a handler that was there before and puts it back at the end."""

    def __init__(self, signum: signal.Signals = signal.SIGTERM) -> None:
        self._signum = signum
        self._previous: Any = None
        self._is_installed = False
        self.noticed_at: float | None = None

    def install(self) -> None:
        """Take over the signal; outside the main thread Python forbids it, which is told once."""
        try:
            self._previous = signal.signal(self._signum, self._on_signal)
            self._is_installed = True
        except ValueError:
            logger.warning(
                "not in the main thread: %s is not watched, a preemption will look like a kill", self._signum.name
            )

    def uninstall(self) -> None:
        if self._is_installed:
            signal.signal(self._signum, self._previous if self._previous is not None else signal.SIG_DFL)
            self._is_installed = False

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.noticed_at is None:
            self.noticed_at = time.monotonic()
        if callable(self._previous):
            self._previous(signum, frame)
