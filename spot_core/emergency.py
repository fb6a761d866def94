"""The emergency path: what a notice calls for at each step boundary, until the end comes or the notice is withdrawn.

With the time to the end known, the work is saved twice: at once, so that it is safe whatever comes, and again as late
as a checkpoint can still become durable. In between training goes on: a notice of two minutes is two minutes of paid
time. A signal's sender waits for this process: then the step is saved, and it leaves.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from enum import Enum

from spot_core.cadence.interval import MARGIN_S
from spot_core.notice.notice import Notice

logger = logging.getLogger(__name__)

# What standing in takes beside the checkpoint.
_STANDING_IN_S = 3.0
# A deadline that has passed by so much, and nothing happened, was none.
_FALSE_AFTER_S = 60.0


class Action(Enum):
    """What to do at this boundary."""

    NONE = "none"  # nothing
    SAVE = "save"  # take a checkpoint that is due
    TRAIN = "train"  # go on, and save nothing
    COPY = "copy"  # take the safe copy, then train on
    LEAVE = "leave"  # save this step, wait until it is durable, end
    HOLD = "hold"  # nothing more fits: wait for what is on its way, end


def decide(left_s: float, *, rescue_s: float, step_s: float, is_copied: bool, is_durable: bool) -> Action:
    """Pure. left_s: to the end. rescue_s: until a checkpoint taken now is durable, with a margin. step_s: to the next
    boundary. is_copied: the safe copy was taken; is_durable: and is on the remote."""
    is_last_call = left_s < rescue_s + step_s
    if is_copied:
        if not is_last_call:
            return Action.TRAIN
        # A copy that is still on its way would only be held up by another one. A step that took a little longer than
        # the others is what the margin is for.
        return Action.LEAVE if is_durable and rescue_s - MARGIN_S / 2 <= left_s else Action.HOLD
    if rescue_s > left_s:
        return Action.TRAIN
    return Action.LEAVE if is_last_call else Action.COPY


class EmergencyPath:
    """The notices of one life. grace_s: from a signal to the kill.

    deadline: monotonic seconds at which what is announced happens, None while nothing is.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._notice: Notice | None = None
        self._ignored: Notice | None = None  # its time has passed, and nothing happened
        self._copied_step: int | None = None
        self._is_told = False
        self.deadline: float | None = None

    def at_boundary(
        self,
        notice: Notice | None,
        signalled_at: float | None,
        *,
        costs: Callable[[], tuple[float, float]],
        is_durable: Callable[[int], bool],
    ) -> Action:
        """What to do now. notice: the one that stands. signalled_at: monotonic seconds when a signal came.

        costs: seconds until a checkpoint taken now is durable, and to the next boundary. is_durable: whether the
        checkpoint of a step is on the remote. Both are asked only if something is announced.
        """
        if notice is None and signalled_at is None and self._notice is None:
            return Action.NONE
        now = time.monotonic()
        self._take(notice, now)
        if signalled_at is not None:
            signalled = signalled_at + self._grace_s
            self.deadline = signalled if self.deadline is None else min(self.deadline, signalled)
            return Action.LEAVE
        if self._notice is None or self.deadline is None:
            return Action.NONE
        left_s = self.deadline - now
        if left_s < -_FALSE_AFTER_S:
            logger.warning("the end that %s announced did not come: training goes on as usual", self._notice.source)
            self._ignored = self._notice
            self._forget()
            return Action.NONE
        rescue_s, step_s = costs()
        copied = self._copied_step
        action = decide(
            left_s,
            rescue_s=rescue_s,
            step_s=step_s,
            is_copied=copied is not None,
            is_durable=copied is not None and is_durable(copied),
        )
        self._tell(action, left_s, rescue_s)
        if action is Action.LEAVE and copied is not None:
            logger.warning("saving once more: a checkpoint takes %.1f s, and %.1f s are left", rescue_s, left_s)
        return action

    def is_last_call(self, notice: Notice | None, signalled_at: float | None, rescue_s: float) -> bool:
        """Whether the last moment has come for what stands in for a training thread that may yet come by itself."""
        now = time.monotonic()
        ends = [] if signalled_at is None else [signalled_at + self._grace_s]
        if notice is not None and notice != self._ignored:
            ends.append(now + notice.deadline_unix_s - time.time())
        return bool(ends) and min(ends) - now < rescue_s + _STANDING_IN_S

    def copied(self, step: int) -> None:
        """The safe copy was taken at this step."""
        self._copied_step = step

    def _take(self, notice: Notice | None, now: float) -> None:
        if notice is not None and notice == self._ignored:
            return
        if notice == self._notice:
            return
        before, self._notice = self._notice, notice
        if notice is None:
            if before is not None:
                logger.warning("%s withdrew its notice: training goes on as usual", before.source)
            self._forget()
            return
        # What is left is taken over once, so that a clock that is set meanwhile changes nothing.
        left_s = notice.deadline_unix_s - time.time()
        if before is not None:
            logger.warning("the end comes in %.0f s now, says %s", left_s, notice.source)
        self.deadline = now + left_s

    def _forget(self) -> None:
        self._notice, self._copied_step, self._is_told, self.deadline = None, None, False, None

    def _tell(self, action: Action, left_s: float, rescue_s: float) -> None:
        assert self._notice is not None
        if self._is_told:
            return
        self._is_told = True
        what = f"{self._notice.source} takes this instance in {left_s:.0f} s, and a checkpoint takes {rescue_s:.1f} s"
        if action is Action.COPY:
            logger.warning("%s: saving now, and once more just before the end; in between training goes on", what)
        elif action is Action.LEAVE:
            logger.warning("%s: saving now", what)
        else:
            logger.error(
                "%s until it is durable: %.1f s too many. The checkpoint before stands, and training goes on until the "
                "end. Longer notices, a faster remote or a smaller state would save this work too",
                what,
                rescue_s - left_s,
            )
