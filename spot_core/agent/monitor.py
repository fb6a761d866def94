"""Follows the agent from the trainer: what is durable, how long drains take, fences; restarts an agent that died.

One daemon thread reads the agent's status twice a second. It hands over through single assignments and a deque, so
that the training thread never waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from spot_core.agent.client import AgentClient
from spot_core.agent.journal import AgentStatus, Journal
from spot_core.errors import SpotError
from spot_core.notice.notice import Notice
from spot_core.progress import byte_bar
from spot_core.store.layout import CheckpointName

logger = logging.getLogger(__name__)

_EVERY_S = 0.5
_LOOKS = 10
_RESTART_EVERY_S = 30.0
_WAIT_S = 0.05


class AgentMonitor:
    """The trainer's view of its agent.

    uploads: seconds from local commit to durable, one entry a drained checkpoint, for the cadence to take.
    fence: why this life must stop, if a newer one exists. on_look: called every few seconds, in this thread.
    """

    def __init__(self, client: AgentClient, journal: Journal, on_look: Callable[[], None] = lambda: None) -> None:
        self._client, self._journal, self._on_look = client, journal, on_look
        self._status = AgentStatus()
        self._notice: Notice | None = None
        self._counted: set[str] = set()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="spot-monitor", daemon=True)
        self._waiting: deque[tuple[CheckpointName, float]] = deque()
        self._reading, self._reviving = threading.Lock(), threading.Lock()
        self._revive_after = 0.0
        self.uploads: deque[float] = deque()
        self.fence: str | None = None

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()

    @property
    def newest_durable(self) -> CheckpointName | None:
        return CheckpointName.parse(self._status.newest_durable or "")

    @property
    def durable(self) -> frozenset[CheckpointName]:
        """Names committed and verified on the remote, as the agent last said: it may know of more by now."""
        return frozenset(filter(None, map(CheckpointName.parse, self._status.durable)))

    @property
    def drain_failure(self) -> str | None:
        return self._status.last_failure if self._status.is_drain_failing else None

    @property
    def hinted_unix_s(self) -> float | None:
        """When the provider said that this instance is in danger, None if it did not."""
        return self._status.hinted_unix_s

    @property
    def notice(self) -> Notice | None:
        """The preemption that is announced, as far as the agent has seen."""
        return self._notice

    @property
    def pending_s(self) -> float | None:
        """How long the oldest commit newer than what is durable has waited, None if there is none."""
        try:
            _, since = self._waiting[0]
        except IndexError:
            return None
        return time.monotonic() - since

    def committed(self, name: CheckpointName) -> None:
        """Writer thread: a checkpoint was committed locally."""
        self._waiting.append((name, time.monotonic()))

    def wait_durable(self, name: CheckpointName, deadline: float) -> bool:
        """Wait until `name` is durable on the remote, at most until `deadline` (monotonic seconds)."""
        while True:
            self._read()
            if self.newest_durable is not None and self.newest_durable >= name:
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(_WAIT_S)

    def wait_ended(self, deadline: float) -> None:
        """Wait until the agent has drained everything and ended, with a progress bar while it uploads.

        Nothing else watches it any more: if it is killed now, it is started again from here.
        """
        self._revive_after = 0.0
        with byte_bar("draining", is_in_logs=True) as on_progress:
            while time.monotonic() < deadline:
                code = self._client.exit_code()
                if code is not None and not _is_crash(code):
                    break
                if code is not None:
                    self._revive()
                self._read()
                if self._status.draining:
                    on_progress(self._status.done_bytes, self._status.total_bytes)
                time.sleep(_WAIT_S)
        self._read()

    def _watch(self) -> None:
        looked = 0
        while not self._closed.wait(_EVERY_S):
            self._read()
            if self.fence is None:
                self._revive()
            if looked % _LOOKS == 0:
                self._on_look()
            looked += 1

    def _revive(self) -> None:
        """Start an agent that has ended again, no sooner than `_RESTART_EVERY_S` after the last time."""
        with self._reviving:
            code = self._client.exit_code()
            if code is None or time.monotonic() < self._revive_after:
                return
            self._revive_after = time.monotonic() + _RESTART_EVERY_S
            try:
                logger.warning("the agent ended with code %s, starting it again", code)
                self._client.restart()
            except (SpotError, OSError) as error:
                logger.warning("the agent could not be started, checkpoints stay local for now: %s", error)

    def _read(self) -> None:
        with self._reading:  # a wait at the end of training reads beside the thread
            status = self._journal.read_status()
            if status is not None:
                self._take(status)
            self._notice = self._journal.read_notice()

    def _take(self, status: AgentStatus) -> None:
        if status.is_drain_failing and not self._status.is_drain_failing:
            logger.warning("drain failed, training goes on and the drain is retried: %s", status.last_failure)
        self._status = status
        self.uploads.extend(seconds for name, seconds in status.drained.items() if name not in self._counted)
        self._counted = set(status.drained)
        if status.fence is not None:
            self.fence = status.fence
        durable = self.newest_durable
        # Older ones need no upload any more. Commits are appended in this order meanwhile.
        while durable is not None and self._waiting and self._waiting[0][0] <= durable:
            self._waiting.popleft()


def _is_crash(code: int) -> bool:
    """Whether an agent was ended by a signal or an exception, as opposed to its own decision."""
    return code < 0 or code == 1
