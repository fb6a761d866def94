"""The run's folder on the local tier, as one life needs it: its records, the journal, room, and what was committed.

The folder may fill up, become read-only or be removed while training goes on. Before each commit it is brought back to
what both processes rely on; what cannot be brought back fails that commit, never training.
Threads: `prepare` and `add` on the writer thread; the rest on the training thread, while nothing is being written.
"""

from __future__ import annotations

import logging
import time

from spot_core.agent.journal import Journal, Progress
from spot_core.agent.monitor import AgentMonitor
from spot_core.errors import SpotError
from spot_core.store import incarnation, layout, resume, volume
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.posix import PosixTier

logger = logging.getLogger(__name__)


class LocalRun:
    """The local folder of one life.

    committed: step -> checkpoint of this life that exists, here or on the remote, with those it resumed from.
    is_short: whether the last commit was refused for lack of room, which may come as the agent drains.
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
    ) -> None:
        self._tier, self._journal, self._agent, self._number = tier, journal, agent, number
        self._records = {path: tier.read(path) for path in (layout.RUN, layout.incarnation(number))}
        self._device = tier.root.stat().st_dev
        self._progress = progress
        self._is_unusable = False
        self._is_ended = False
        self.committed = committed
        self.is_short = False
        self._newest_here = self.newest
        journal.open_progress(progress)

    @property
    def newest(self) -> CheckpointName | None:
        return max(self.committed.values(), default=None)

    def write_progress(self, progress: Progress) -> None:
        self._progress = progress
        self._journal.write_progress(progress)

    def prepare(self, manifest: Manifest, expected_bytes: int) -> None:
        """The folder is there, this life's, and has room for the checkpoint that is about to be written.

        Raises TierError, CommitConflictError (the folder is another run's now), FencedError.
        """
        self.is_short = False
        self.keep()
        pinned = {manifest.pins} if manifest.pins is not None else set()
        self.is_short = True
        volume.make_room(self._tier, expected_bytes, durable=self._agent.durable, pinned=pinned)
        self.is_short = False

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
        durable, here = self._agent.durable, set(resume.names(self._tier))
        newest = max(durable, default=None)
        gone = {step: name for step, name in self.committed.items() if name not in here | durable}
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

    def add(self, name: CheckpointName) -> None:
        """A checkpoint was committed here."""
        self.committed[name.step] = self._newest_here = name
        self._agent.committed(name)

    def wait_for_room(self, timeout_s: float) -> bool:
        """If the last commit was refused for lack of room: wait until what is here is drained, so that it may go."""
        newest = self._newest_here
        return self.is_short and newest is not None and self._agent.wait_durable(newest, time.monotonic() + timeout_s)

    def is_lost(self, name: CheckpointName | None) -> bool:
        """Whether a committed checkpoint is neither here any more nor durable."""
        if name is None:
            return True
        return name not in self._agent.durable and not self._tier.path(layout.manifest(name)).exists()

    def mark_complete(self, step: int, max_steps: int | None) -> None:
        """Record that training ended at the checkpoint of `step`, or say why that is not recorded."""
        name = self.committed.get(step)
        try:
            if name is not None:
                self.keep()
                resume.mark_complete(self._tier, name, max_steps)
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

    def wait_drained(self, timeout_s: float, remote_url: str) -> None:
        """Wait until the agent has drained everything; say so if it does not get there."""
        self._agent.wait_ended(time.monotonic() + timeout_s)
        newest = self.newest
        if newest is None or self._agent.newest_durable == newest:
            return
        if self.is_lost(newest):
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
        self._journal.close()

    def end(self, outcome: str) -> bool:
        """Tell the agent how this life ended; only the first word counts. Returns whether it was told."""
        if not self._is_ended:
            self._is_ended = True
            try:
                self._journal.write_outcome(outcome)
            except OSError as error:
                logger.warning("the agent could not be told that this life %s: %s", outcome, error)
                return False
        return True
