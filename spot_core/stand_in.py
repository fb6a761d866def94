"""Leaves in the place of a training thread that does not come to a boundary before an announced end.

In a long evaluation, or while a data loader stalls, the state stands still as it was at the last boundary. The adapter
says so with a capture that any thread may call; where time runs out, this thread takes the last checkpoint from it, and
ends the training thread, or the process where that cannot be ended.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

from spot_core.errors import Preempted
from spot_core.handover import Capture
from spot_core.notice.signals import SignalWatcher

logger = logging.getLogger(__name__)

_EVERY_S = 0.25
# A rest that lasts: in between two steps of a training that gets on there is a short one each time.
_LONG_S = 0.5
# What the training thread has to unwind, when it was told to.
_UNWINDING_S = 5.0


class StandIn:
    """act: called while training rests, with what captures its state; raises Preempted when it has left. signals: with
    which the training thread is ended. may_exit: whether the process may be ended if that thread cannot."""

    def __init__(self, act: Callable[[Callable[[], Capture]], None], signals: SignalWatcher, *, may_exit: bool) -> None:
        self._act, self._signals, self._may_exit = act, signals, may_exit
        self._turn = threading.Lock()  # whose turn it is to take a checkpoint
        self._left: Preempted | None = None
        self._closed = threading.Event()
        self.capture: Callable[[], Capture] | None = None
        self._since = 0.0  # when the rest began

    def start(self) -> None:
        threading.Thread(target=self._watch, name="spot-stand-in", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def rests(self, capture: Callable[[], Capture]) -> None:
        """Training thread: from here on nothing that `capture` reads changes, until `moves` or a boundary."""
        self._since = time.monotonic()
        self.capture = capture

    def moves(self) -> None:
        """Training thread: it goes on. Raises Preempted if it was stood in for."""
        with self:
            pass

    def __enter__(self) -> None:
        """Training thread: nobody else takes a checkpoint in this block. Raises Preempted if it was stood in for."""
        self._turn.acquire()
        if self._left is not None:
            self._turn.release()
            raise self._left
        self.capture = None

    def __exit__(self, *_: object) -> None:
        self._turn.release()

    def _watch(self) -> None:
        while not self._closed.wait(_EVERY_S):
            if not self._is_long_rest() or not self._turn.acquire(blocking=False):
                continue
            try:
                if self.capture is not None and self._is_long_rest():
                    self._act(self.capture)
            except Preempted as left:
                self._left = left
            except Exception:
                logger.exception("the last checkpoint could not be taken; what was committed before stands")
                return
            finally:
                self._turn.release()
            if self._left is not None:
                self._end_training(self._left)
                return

    def _is_long_rest(self) -> bool:
        return self.capture is not None and time.monotonic() - self._since >= _LONG_S

    def _end_training(self, left: Preempted) -> None:
        self._signals.end_training(left)
        if self._closed.wait(_UNWINDING_S) or not self._may_exit:
            return
        logger.warning("the training thread does not end by itself: the process ends without it")
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(int(left.code or 1))
