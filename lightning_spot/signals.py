"""Signals under Lightning: which announce a preemption, what they do before the first step, and SLURM's requeue.

Lightning's own handlers save in the middle of a step and end training with exit code 0. Ours take their place: before
training a signal ends the process at once, since nothing is at risk; while it lasts the session's watcher takes over,
which only sets a flag. What the user had installed is still called, and back in place when `fit` returns.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any

from lightning_spot.namespaces import is_a
from spot_core.notice.signals import LeaveOnSignal


class FitSignals(LeaveOnSignal):
    """The signals of one `fit`. exit_code: of a run that is preempted before its first step."""

    def __init__(self, trainer: Any, signals: Sequence[signal.Signals], exit_code: int) -> None:
        self._trainer = trainer
        self._requeue = _requeue_signal(trainer)
        watched = [*signals] if self._requeue is None else [*signals, self._requeue]
        super().__init__(dict.fromkeys(watched), exit_code)

    def requeue_if_announced(self, received: set[signal.Signals]) -> None:
        """Have Lightning requeue the job if SLURM announced its end: once, and without a second checkpoint.

        received: while training lasted.
        """
        if self._requeue is None or self._requeue not in self.received | received:
            return
        trainer = self._trainer
        trainer.save_checkpoint = lambda *args, **kwargs: None
        try:
            trainer._signal_connector._slurm_sigusr_handler_fn(self._requeue, None)
        finally:
            del trainer.save_checkpoint


def _requeue_signal(trainer: Any) -> signal.Signals | None:
    environment = trainer._accelerator_connector.cluster_environment
    if not is_a(environment, "plugins.environments.SLURMEnvironment") or not environment.auto_requeue:
        return None
    return signal.Signals(environment.requeue_signal or signal.SIGUSR1)
