"""The checkpoints of one life as the trainer takes them: capture, snapshot, writer, and what was committed.

`take` is called on the training thread, or on one that stands in for it while it makes no step; the writer's thread
reports back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from spot_core.agent.local_run import LocalRun
from spot_core.agent.monitor import AgentMonitor
from spot_core.errors import ChangedStateError, FencedError
from spot_core.handover import Capture
from spot_core.report import loggers
from spot_core.snapshot.capture import Snapshotter
from spot_core.snapshot.writer import CheckpointWriter, Written
from spot_core.store.identity import RunIdentity
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.posix import PosixTier

logger = logging.getLogger(__name__)


class Checkpointer:
    """Takes checkpoints. number: of this life. captured_step: the step that was resumed from, if any.

    fence: why nothing more may be committed, if so. failure: why the last commit failed, empty if it did not. is_owed:
    whether the last one assumed what was not so; the next does not.
    """

    def __init__(
        self,
        run: str,
        identity: RunIdentity,
        snapshotter: Snapshotter,
        tier: PosixTier,
        local: LocalRun,
        agent: AgentMonitor,
        *,
        number: int,
        captured_step: int | None,
        versions: Mapping[str, str],
        base_fingerprint: str | None,
    ) -> None:
        self._run, self._identity, self._number = run, identity, number
        self._snapshotter, self._local, self._agent = snapshotter, local, agent
        self._versions, self._base_fingerprint = versions, base_fingerprint
        self._writer = CheckpointWriter(tier, snapshotter, number=number, prepare=local.prepare)
        self.captured_step = captured_step
        self.failure = ""
        self.is_owed = False
        self.fence: str | None = None

    @property
    def is_busy(self) -> bool:
        return self._writer.is_busy

    @property
    def failures(self) -> int:
        return self._writer.failures

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until what was taken is committed or has failed; returns whether it is."""
        return self._writer.wait(timeout_s)

    def take(self, capture: Callable[[], Capture], *, useful_s: float) -> float | None:
        """Take one of the present step; returns the stall in seconds, None if this step is committed already."""
        began = time.perf_counter()
        content = capture()
        if content.step == self.captured_step and not self._local.is_lost(self._local.committed.get(content.step)):
            return None
        snapshot = self._snapshotter.take(content.files, content.is_current)
        self.captured_step, self.is_owed = content.step, False
        self._writer.submit(snapshot, self._manifest(content, useful_s), self._written)
        return time.perf_counter() - began

    def close(self) -> None:
        """Let the writer finish what it has."""
        self._writer.close()

    def _manifest(self, content: Capture, useful_s: float) -> Manifest:
        pins = self._local.committed.get(content.pinned_step) if content.pinned_step is not None else None
        return Manifest(
            run=self._run,
            name=CheckpointName(self._number, content.step),
            epoch=content.epoch,
            useful_s=round(useful_s, 3),
            created=time.time(),
            framework=self._identity.framework,
            native=content.native,
            files=(),
            versions=self._versions,
            world={key: value for key, value in self._identity.facts.items() if isinstance(value, int)},
            notes=content.notes,
            loggers={**loggers.running(), **content.loggers},
            base_fingerprint=self._base_fingerprint,
            pins=pins,
        )

    def _written(self, written: Written) -> None:
        """Writer thread: a checkpoint was committed, or failed (then the writer has said so)."""
        if isinstance(written.error, FencedError):
            self.fence = str(written.error)
        self.failure, self.is_owed = written.failure, isinstance(written.error, ChangedStateError)
        if written.error is not None:
            self.captured_step = None  # this step may be tried again
            return
        manifest = written.manifest
        is_here = self._local.add(manifest.name)
        durable = self._agent.newest_durable
        logger.info(
            "checkpoint: step %d, %.1f MB in %.2f s, %s; remote: %s",
            manifest.step,
            manifest.total_bytes / 1e6,
            written.seconds,
            "durable on the local tier" if is_here else "in memory",
            f"step {durable.step}" if durable else "none yet",
        )
