"""The run's folder on the local tier, as one life needs it: its records, the journal, room, and what was committed.

The folder may fill up, become read-only or be removed while training goes on. Before each commit it is brought back to
what both processes rely on; what it cannot take goes to the overflow in memory, and from there to the remote. Where
there is no room either, that commit fails, never training.
Threads: `prepare` and `add` on the writer thread; the rest on the training thread, while nothing is being written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from spot_core.agent.journal import Journal, Progress
from spot_core.agent.monitor import AgentMonitor
from spot_core.errors import CommitConflictError, FencedError, SpotError, TierError, is_full
from spot_core.store import catalog, incarnation, layout, volume
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.overflow import Overflow
from spot_core.store.posix import PosixTier

logger = logging.getLogger(__name__)

# A local disk that is full again after this long is told again.
_TELL_AGAIN_S = 600.0
_RETRY_S = 1.0
_PROGRESS_EVERY_S = 0.1


class LocalRun:
    """The local folder of one life.

    committed: step -> checkpoint of this life that exists, here or on the remote, with those it resumed from.
    is_short: whether the last commit was refused for lack of room, which may come as the agent drains.
    remote_only: why checkpoints go to the remote without the local disk, empty if they do not.
    """

    def __init__(
        self,
        tier: PosixTier,
        journal: Journal,
        agent: AgentMonitor,
        *,
        number: int,
        progress: Progress,
        committed: dict[int, CheckpointName],
        overflow: Overflow | None = None,
    ) -> None:
        self._tier, self._journal, self._agent, self._number = tier, journal, agent, number
        self._overflow = overflow or Overflow(None)
        self._records = {path: tier.read(path) for path in (layout.RUN, layout.incarnation(number))}
        self._device = tier.root.stat().st_dev
        self._progress = progress
        self._newest_progress: Callable[[], Progress] = lambda: progress
        self._write_at = 0.0
        self._is_unusable = False
        self._is_ended = False
        self.committed = committed
        self.is_short = False
        self.remote_only = ""
        self._told_at: float | None = None
        self._newest_here = max((name for name in committed.values() if self._is_at(tier, name)), default=None)
        journal.open_progress(progress)

    @property
    def newest(self) -> CheckpointName | None:
        return max(self.committed.values(), default=None)

    def made_step(self, progress: Callable[[], Progress]) -> None:
        """A step is done: written down, if that was not done just before. Short steps are many, and a write is dear."""
        self._newest_progress = progress
        if (now := time.monotonic()) >= self._write_at:
            self._write_at = now + _PROGRESS_EVERY_S
            self.write_progress(progress())

    def write_progress(self, progress: Progress) -> None:
        self._progress = progress
        self._journal.write_progress(progress)

    def write_cadence(self, record: dict[str, Any]) -> None:
        """Where the cadence stands, for `spot explain` and the next life. Not after the end: the agent has gone."""
        if not self._is_ended:
            self._journal.write_cadence(record)

    def prepare(self, manifest: Manifest, expected_bytes: int, failure: OSError | None = None) -> PosixTier:
        """Where the checkpoint that is about to be written has room: the local folder, or else the overflow.

        failure: what ended the attempt in the local folder, if there was one.
        Raises TierError, CommitConflictError (the folder is another run's now), FencedError.
        """
        self.is_short = False
        try:
            if failure is not None:
                raise failure
            self.keep()
            pinned = {manifest.pins} if manifest.pins is not None else set()
            volume.make_room(self._tier, expected_bytes, durable=self._agent.durable, pinned=pinned)
        except (FencedError, CommitConflictError):
            raise
        except (SpotError, OSError) as error:
            return self._pass_by(error, expected_bytes)
        if self.remote_only:
            logger.info("there is room in %s again: checkpoints are written there as usual", self._tier.url)
            self.remote_only = ""
        return self._tier

    def _pass_by(self, error: SpotError | OSError, expected_bytes: int) -> PosixTier:
        """The overflow, with room. Raises TierError if it has none either."""
        reason = getattr(error, "strerror", None) or str(error)
        try:
            tier = self._overflow.make_room(expected_bytes)
        except (SpotError, OSError) as short:
            self.remote_only = ""
            self.is_short = is_full(error)
            if self._overflow.folder is None:
                raise error from None
            nor = f"{reason}; nor is there room in memory: {getattr(short, 'strerror', None) or short}"
            raise TierError(getattr(error, "errno", None), nor) from error
        now = time.monotonic()
        if not self.remote_only and (self._told_at is None or now - self._told_at > _TELL_AGAIN_S):
            self._told_at = now
            logger.warning(
                "%s: while that lasts, checkpoints go to the remote without the local disk, through memory (%s). "
                "Training goes on and nothing that was committed was touched; what is not on the remote yet would be "
                "lost with this machine. Free space there or, for the next life, set local= (SPOT_LOCAL) to a larger "
                "disk of this instance",
                reason,
                tier.url,
            )
        self.remote_only = reason
        return tier

    def keep(self) -> None:
        """Make the folder again if it was removed or emptied, and say so. Raises as `prepare`."""
        try:
            missing = [path for path, data in self._records.items() if not self._holds(path, data)]
            newest = self._newest_here
            if newest is not None and not self._tier.path(layout.manifest(newest)).exists():
                missing.append(layout.manifest(newest))
            if not missing and self._journal.has_progress():
                return
            incarnation.check_fence(self._tier, self._number)
            for path, data in self._records.items():
                self._tier.create(path, data)
            self._journal.open_progress(self._progress)
        except (SpotError, OSError):
            self._is_unusable = True  # the writer says so
            raise
        self._tell_remade(missing)

    def _holds(self, path: str, data: bytes) -> bool:
        try:
            return self._tier.read(path) == data
        except FileNotFoundError:
            return False

    def _tell_remade(self, missing: list[str]) -> None:
        durable, here = self._agent.durable, set(catalog.names(self._tier))
        newest = max(durable, default=None)
        safe = here.union(durable, self._overflow.names())
        gone = {step: name for step, name in self.committed.items() if name not in safe}
        self.committed = {step: name for step, name in self.committed.items() if step not in gone}
        self._newest_here = max(here.intersection(self.committed.values()), default=None)
        lost = [str(name) for name in gone.values() if newest is None or name > newest]
        device, self._device = self._device, self._tier.root.stat().st_dev
        logger.log(
            logging.WARNING if self._is_unusable else logging.ERROR,
            "the local folder %s was removed or emptied during training (%s gone)%s; training goes on, the folder is "
            "made again and checkpoints continue. Durable on the remote: %s.%s Look for what removes it",
            self._tier.url,
            ", ".join(missing) or layout.JOURNAL,
            " and is on another volume now" if device != self._device else "",
            f"step {newest.step}" if newest else "nothing reported yet",
            f" Not known to have been drained: {', '.join(lost)}." if lost else "",
        )
        self._is_unusable = False

    def add(self, name: CheckpointName) -> bool:
        """A checkpoint was committed where `prepare` said; returns whether that is the local folder."""
        self.committed[name.step] = name
        if not self.remote_only:
            self._newest_here = name
        self._agent.committed(name)
        return not self.remote_only

    def describe(self, newest: CheckpointName | None, *, is_durable: bool) -> str:
        """What a life that is stopped leaves behind. is_durable: whether its newest checkpoint is on the remote."""
        if newest is None:
            return "nothing could be committed in time"
        where = "in memory only" if self._is_in_memory(newest) else "on the local tier only"
        return f"step {newest.step} is " + (
            "durable on the remote" if is_durable else f"{where}, the agent goes on draining it"
        )

    def wait_for_room(self, timeout_s: float) -> bool:
        """If the last commit was refused for lack of room: wait until all before it is drained, so that it may go."""
        newest = self.newest
        return self.is_short and newest is not None and self._agent.wait_durable(newest, time.monotonic() + timeout_s)

    def until_it_fits(self, commit: Callable[[], object], deadline: float) -> None:
        """Call `commit`, again while it is refused for lack of room, until `deadline` (monotonic seconds)."""
        commit()
        while self.is_short and (left_s := deadline - time.monotonic()) > _RETRY_S:
            time.sleep(_RETRY_S)
            self.wait_for_room(left_s - _RETRY_S)
            commit()

    def is_lost(self, name: CheckpointName | None) -> bool:
        """Whether a committed checkpoint is neither here any more nor durable."""
        if name is None:
            return True
        return not (name in self._agent.durable or self._is_at(self._tier, name) or self._is_in_memory(name))

    def _is_in_memory(self, name: CheckpointName) -> bool:
        tier = self._overflow.tier
        return tier is not None and self._is_at(tier, name)

    def _is_at(self, tier: PosixTier, name: CheckpointName) -> bool:
        return tier.path(layout.manifest(name)).exists()

    def mark_complete(self, step: int, max_steps: int | None) -> None:
        """Record that training ended at the checkpoint of `step`, or say why that is not recorded."""
        name = self.committed.get(step)
        try:
            if name is not None:
                self._mark_complete(name, max_steps)
                return
            reason: object = "its last checkpoint could not be written"
        except (SpotError, OSError) as error:
            reason = error
        newest = self._agent.newest_durable
        logger.error(
            "training is complete, but that is not recorded in %s: %s. Durable on the remote: %s. The trainer's own "
            "output is whole; the same command, run again, would repeat the training after that step",
            self._tier.url,
            reason,
            f"step {newest.step}" if newest else "nothing reported yet",
        )

    def _mark_complete(self, name: CheckpointName, max_steps: int | None) -> None:
        try:
            self.keep()
            catalog.mark_complete(self._tier, name, max_steps)
        except (FencedError, CommitConflictError):
            raise
        except (SpotError, OSError):
            if self._overflow.folder is None:
                raise
            catalog.mark_complete(self._overflow.make(), name, max_steps)

    def wait_drained(self, timeout_s: float, remote_url: str) -> None:
        """Wait until the agent has drained everything; say so if it does not get there."""
        self._agent.wait_ended(time.monotonic() + timeout_s)
        newest = self.newest
        if newest is None or self._agent.newest_durable == newest:
            return
        if self._is_in_memory(newest):
            where = f"it is in memory ({self._overflow.folder}) until the next boot. To finish: spot agent --once "
            where += f"--local {self._tier.url} --remote {remote_url}"
        elif self.is_lost(newest):
            where = f"its copy in {self._tier.url} is gone. The same command, run again, repeats what is missing"
        else:
            where = f"it is whole in {self._tier.url}. To finish: spot agent --once --local {self._tier.url} --remote "
            where += remote_url
        logger.error(
            "training is complete but checkpoint %s is not on the remote (%s); %s",
            newest,
            self._agent.drain_failure or "the drain did not end in time",
            where,
        )

    def close(self) -> None:
        """Let go of everything; of the overflow too if the agent has ended."""
        self._journal.close()
        self._overflow.remove(self._number, but=self._overflow.names())

    def end(self, outcome: str) -> bool:
        """Tell the agent how this life ended; only the first word counts. Returns whether it was told."""
        if not self._is_ended:
            self._is_ended = True
            self.write_progress(self._newest_progress())
            try:
                self._journal.write_outcome(outcome)
            except OSError as error:
                logger.warning("the agent could not be told that this life %s: %s", outcome, error)
                return False
        return True
