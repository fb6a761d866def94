"""Signals under Lightning: which announce a preemption, what they do before the first step, and SLURM's requeue.

Lightning's own handlers save in the middle of a step and end training with exit code 0. Ours take their place: before
training a signal ends the process at once, since nothing is at risk; while it lasts the session's watcher takes over,
which only sets a flag. What the user had installed is still called, and back in place when `fit` returns.
"""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from lightning_spot.namespaces import is_a
from spot_core.handover import Preempted

logger = logging.getLogger(__name__)


class FitSignals:
    """The signals of one `fit`. exit_code: of a run that is preempted before its first step."""

    def __init__(self, trainer: Any, exit_code: int) -> None:
        self._trainer, self._exit_code = trainer, exit_code
        self._requeue = _requeue_signal(trainer)
        watched = [signal.SIGTERM] if self._requeue is None else [signal.SIGTERM, self._requeue]
        self.of_user: dict[signal.Signals, Any] = {signum: signal.getsignal(signum) for signum in watched}
        self._received: set[signal.Signals] = set()

    def __enter__(self) -> FitSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in self.of_user:
                signal.signal(signum, self._leave)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum, handler in self.of_user.items():
                signal.signal(signum, handler if handler is not None else signal.SIG_DFL)

    def requeue_if_announced(self, received: set[signal.Signals]) -> None:
        """Have Lightning requeue the job if SLURM announced its end: once, and without a second checkpoint.

        received: while training lasted.
        """
        if self._requeue is None or self._requeue not in self._received | received:
            return
        trainer = self._trainer
        trainer.save_checkpoint = lambda *args, **kwargs: None
        try:
            trainer._signal_connector._slurm_sigusr_handler_fn(self._requeue, None)
        finally:
            del trainer.save_checkpoint

    def _leave(self, signum: int, frame: FrameType | None) -> None:
        self._received.add(signal.Signals(signum))
        handler = self.of_user[signal.Signals(signum)]
        if callable(handler):
            handler(signum, frame)
        logger.warning(
            "preempted before the first step, nothing is lost; leaving with exit code %d, run the same command again",
            self._exit_code,
        )
        raise Preempted(self._exit_code)


def _requeue_signal(trainer: Any) -> signal.Signals | None:
    environment = trainer._accelerator_connector.cluster_environment
    if not is_a(environment, "plugins.environments.SLURMEnvironment") or not environment.auto_requeue:
        return None
    return signal.Signals(environment.requeue_signal or signal.SIGUSR1)
