"""The session of a rank other than 0: no agent, no storage and no policy. It does what rank 0 has announced.

The same calls as `Session`, so that adapters need not know which they hold.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

from spot_core.config import SpotConfig
from spot_core.emergency import Action
from spot_core.errors import Preempted
from spot_core.handover import Capture, ResumePoint, certain
from spot_core.notice.signals import SignalWatcher, of_user
from spot_core.ranks.team import Opened, Team

logger = logging.getLogger(__name__)

_EVERY_S = 0.1
# For the process of rank 0 to end, when it has saved.
_ENDING_S = 30.0


class Follower:
    """resume: what rank 0 found, verified, on the local tier."""

    def __init__(self, config: SpotConfig, team: Team, opened: Opened) -> None:
        self.config, self._team, self._opened = config, team, opened
        self.resume: ResumePoint | None = opened.resume
        self.signals = SignalWatcher()
        self.has_begun = False
        self._boundary = 0

    def is_finished(self, max_steps: int | None) -> bool:
        """Whether training ended at the restored checkpoint and was to last as long."""
        return not self._opened.is_claimed and self._opened.max_steps == max_steps

    def begin(self, *, notes: tuple[str, ...] = (), signals: Mapping[signal.Signals, Any] | None = None) -> None:
        """Training starts: watch for signals. notes: rank 0 tells them."""
        self.has_begun = True
        self.signals.install(signals if signals is not None else of_user(self.config.signal_numbers))

    def step_started(self) -> None:
        """Rank 0 takes the time."""

    def before_optimizer_step(self) -> None:
        """Nothing is being copied here."""

    def step_completed(self, step: int) -> None:
        """Pass on that a signal came."""
        if self.signals.noticed_at is not None:
            self._team.board.signalled(self._team.rank, self.signals.noticed_at)

    def rests(self, capture: Callable[[], Capture]) -> None:
        """Ranks leave together, at a boundary."""

    def moves(self) -> None:
        """See `rests`."""

    def pause(self) -> None:
        """Rank 0 takes the time."""

    def at_boundary(self, capture: Callable[[], Capture], *, is_required: bool = False) -> None:
        """Hand over this rank's part where a checkpoint is taken. Raises Preempted where rank 0 leaves."""
        self._boundary += 1
        action = self._team.board.announced(self._boundary)
        if is_required or action in {Action.SAVE, Action.COPY, Action.LEAVE}:
            self._hand_over(capture)
        if action in {Action.LEAVE, Action.HOLD}:
            self._leave()

    def finish(self, capture: Callable[[], Capture]) -> None:
        """Training is complete: the final state."""
        self._hand_over(capture)

    def wait_drained(self) -> None:
        """Rank 0 waits for the remote."""

    def end_if_signalled(self, error: Exception) -> None:
        """Training broke off: raise Preempted if that is since a signal reached the loader's workers too."""
        if self.signals.has_ended_workers(error):
            raise Preempted(self.config.preempt_exit_code)  # rank 0 may be waiting for this one: it is not waited for

    def close(self, error: BaseException | None = None) -> None:
        """Let go of everything. error: what ended training, None if it returned."""
        self._team.close()
        self.signals.uninstall(is_leaving=isinstance(error, Preempted) and self.config.on_preempt == "exit")

    def _hand_over(self, capture: Callable[[], Capture]) -> None:
        content = certain(capture)
        try:
            self._team.hand_over(content.step, content.files)
        except OSError as error:
            logger.error(
                "rank %d could not hand over its part of the checkpoint of step %d (%s); training goes on, nothing "
                "that was committed was touched, the next one is tried as usual",
                self._team.rank,
                content.step,
                error,
            )

    def _leave(self) -> None:
        """After rank 0, which is still saving: launchers end all ranks when the first one does."""
        if self.config.on_preempt == "exit":
            until = math.inf
            while not self._team.has_leader_ended() and time.monotonic() < until:
                if until == math.inf and self._team.is_over:
                    until = time.monotonic() + _ENDING_S
                time.sleep(_EVERY_S)
        raise Preempted(self.config.preempt_exit_code)
