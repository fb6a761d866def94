"""The termination signals: before training they end the process at once, and while it lasts they only set a flag.

Handlers run between two byte codes of the main thread, possibly in the middle of a backward pass: saving there
would store a torn state. Further signals change nothing; Ctrl-C does what it always does, and ends training.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from types import FrameType, TracebackType
from typing import Any

from typing_extensions import Self

from spot_core.errors import Preempted

logger = logging.getLogger(__name__)


def of_user(signals: Iterable[signal.Signals]) -> dict[signal.Signals, Any]:
    """Each signal with the handler that is installed for it now."""
    return {signum: signal.getsignal(signum) for signum in signals}


class LeaveOnSignal:
    """Until training begins nothing is at risk: a signal calls the user's handler and ends the process.

    of_user: the handlers that were there, back in place in the end. received: what came meanwhile.
    """

    def __init__(self, signals: Iterable[signal.Signals], exit_code: int) -> None:
        self._exit_code = exit_code
        self._is_main = threading.current_thread() is threading.main_thread()
        self.of_user = of_user(signals)
        self.received: set[signal.Signals] = set()

    def __enter__(self) -> Self:
        if self._is_main:
            for signum in self.of_user:
                signal.signal(signum, self._leave)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._is_main:
            for signum, handler in self.of_user.items():
                signal.signal(signum, handler if handler is not None else signal.SIG_DFL)

    def _leave(self, signum: int, frame: FrameType | None) -> None:
        self.received.add(signal.Signals(signum))
        handler = self.of_user[signal.Signals(signum)]
        if callable(handler):
            handler(signum, frame)
        logger.warning(
            "preempted before the first step, nothing is lost; leaving with exit code %d, run the same command again",
            self._exit_code,
        )
        raise Preempted(self._exit_code)


class SignalWatcher:
    """Remembers when the signals arrived. Puts back at the end the handlers that were there before, unless somebody
    else has taken a signal over meanwhile."""

    def __init__(self) -> None:
        self._previous: dict[signal.Signals, Any] = {}
        self._chained: dict[signal.Signals, Any] = {}
        self.noticed_at: float | None = None
        self.received: set[signal.Signals] = set()
        self._end: Preempted | None = None

    def end_training(self, end: Preempted) -> None:
        """Another thread: raise `end` in the main thread, at its next byte code. Nothing where no signal is watched."""
        self._end = end
        ours = [signum for signum in self._previous if signal.getsignal(signum) == self._on_signal]
        if ours:
            signal.pthread_kill(threading.main_thread().ident or 0, ours[0])

    def install(self, chained: Mapping[signal.Signals, Any]) -> None:
        """Take over the signals of `chained`, each with the handler that is called after ours.

        Outside the main thread Python forbids to watch signals, which is told once.
        """
        self._chained = dict(chained)
        try:
            for signum in self._chained:
                self._previous[signum] = signal.signal(signum, self._on_signal)
        except ValueError:
            names = ", ".join(signum.name for signum in self._chained)
            logger.warning("not in the main thread: %s is not watched, a preemption will look like a kill", names)

    def uninstall(self, *, is_leaving: bool = False) -> None:
        """Put the handlers back. is_leaving: not the one by which PyTorch tells that a worker has died: the process is
        about to end, with a code of its own."""
        if is_leaving:
            self._previous.pop(signal.SIGCHLD, None)
        for signum, previous in self._previous.items():
            if signal.getsignal(signum) in {self._on_signal, signal.SIG_DFL}:
                signal.signal(signum, previous if previous is not None else signal.SIG_DFL)
        self._previous.clear()

    def has_ended_workers(self, error: Exception) -> bool:
        """Whether a signal came, and `error` is what PyTorch raises where it has ended a loader's workers too."""
        return self.noticed_at is not None and _is_of_workers(error)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._end is not None:
            end, self._end = self._end, None  # once: a second one must not break off the unwinding
            raise end
        if self.noticed_at is None:
            self.noticed_at = time.monotonic()
            # The signal may have gone to the whole group. PyTorch then raises that a loader's worker has died, wherever
            # this thread happens to be: in the middle of the last checkpoint, for one.
            self._previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.received.add(signal.Signals(signum))
        chained = self._chained.get(signal.Signals(signum))
        if callable(chained):
            chained(signum, frame)


def _is_of_workers(error: Exception) -> bool:
    """Whether `error` says that a loader's worker has died, or comes from taking over a batch from one that has."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in str(error)  # not what the dataset raises in one
    if not isinstance(error, (EOFError, OSError)):
        return False
    frames = traceback.walk_tb(error.__traceback__)
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in frames]
    is_of_loader = any(module.startswith("torch.utils.data.") for module in modules)
    is_taken_over = any(module.startswith("multiprocessing.") for module in modules) or "pin memory" in str(error)
    return is_of_loader and is_taken_over
