"""A session: one life of a run, as the trainer sees it. Adapters hold one and tell it where steps begin and end.

    session = Session.open(config, identity, device=…)     the agent checks, restores and claims
    session.resume                                         what to load, verified, on the local tier
    session.begin()                                        training starts
    loop: session.step_started(); …; session.before_optimizer_step(); optimizer.step();
          session.step_completed(step); session.at_boundary(capture)
    session.finish(capture); session.wait_drained()        training is complete
    session.close(error)                                   always

Threads: all public methods on the training thread. The copy, the writer and the agent's monitor have threads of
their own, which never hold up a step.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from spot_core.agent import lives
from spot_core.agent.client import AgentClient, OpenedRun
from spot_core.agent.journal import Journal, Progress
from spot_core.agent.local_run import LocalRun
from spot_core.agent.monitor import AgentMonitor
from spot_core.config import SpotConfig
from spot_core.errors import FencedError, shown
from spot_core.handover import Capture, Preempted, ResumePoint
from spot_core.notice.signals import SignalWatcher
from spot_core.pacing import Pacer
from spot_core.report import loggers
from spot_core.report.log import make_visible
from spot_core.snapshot.capture import Snapshotter
from spot_core.snapshot.writer import CheckpointWriter, Written
from spot_core.store.identity import RunIdentity
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.overflow import room_bytes
from spot_core.store.posix import check_usable
from spot_core.store.volume import describe_place

logger = logging.getLogger(__name__)


class Session:
    """One life of a run. Make it with `open`."""

    def __init__(
        self,
        config: SpotConfig,
        identity: RunIdentity,
        client: AgentClient,
        opened: OpenedRun,
        *,
        device: torch.device,
        state_bytes: int,
        versions: Mapping[str, str],
        base_fingerprint: str | None,
    ) -> None:
        self.config, self._identity, self._client = config, identity, client
        self._opened = opened
        self._tier = client.tier
        self._versions, self._base_fingerprint = versions, base_fingerprint
        self.resume: ResumePoint | None = None
        if opened.restored is not None:
            self.resume = ResumePoint.read(client.near_tiers, opened.restored, opened.pin, source=str(opened.source))
        self._pacer = Pacer(
            config,
            opened,
            started_unix_s=client.started_unix_s,
            began=client.began,
            useful_before_s=self.resume.manifest.useful_s if self.resume else 0.0,
            state_bytes=state_bytes,
        )
        self._snapshotter = Snapshotter(device)
        self.signals = SignalWatcher()
        self._captured_step: int | None = None
        self._failure = ""  # of the last local commit, if it failed
        self._fence: str | None = None
        self._local: LocalRun | None = None
        self._writer: CheckpointWriter | None = None
        self._agent: AgentMonitor | None = None

    # -- start ---------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        config: SpotConfig,
        identity: RunIdentity,
        *,
        device: torch.device,
        state_bytes: int = 0,
        versions: Mapping[str, str] | None = None,
        base_fingerprint: str | None = None,
    ) -> Session:
        """Start the agent, which checks the place, restores the newest valid checkpoint and claims a life.

        state_bytes: expected size of a checkpoint, to refuse a local folder that cannot hold one.
        Raises ConfigError, TierError, TierDeniedError, CorruptCheckpointError: training must not start.
        """
        make_visible()
        client = AgentClient(config, identity)
        check_usable(client.run_folder, state_bytes, elsewhere_bytes=room_bytes())
        logger.info("run %s: local tier %s, remote tier %s", config.run, client.run_folder, shown(config.remote))
        for level, sentence in describe_place(client.run_folder, config.remote):
            logger.log(level, "%s", sentence)
        return cls(
            config,
            identity,
            client,
            client.open(),
            device=device,
            state_bytes=state_bytes,
            versions={"torch": torch.__version__, "device": _device_name(device), **(versions or {})},
            base_fingerprint=base_fingerprint,
        )

    def is_finished(self, max_steps: int | None) -> bool:
        """Whether training ended at the restored checkpoint and was to last as long: nothing is left to do."""
        return self._client.incarnation is None and self._opened.max_steps == max_steps

    @property
    def has_begun(self) -> bool:
        """Whether training started under this session."""
        return self._local is not None

    def begin(self, *, notes: tuple[str, ...] = (), signals: Mapping[signal.Signals, Any] | None = None) -> None:
        """Training starts: claim a life if that is still to be done, say where it resumes, watch for signals.

        notes: reasons why this resume is not bit-exact. signals: what announces a preemption, each with the handler
        to call after ours; SIGTERM with its present one by default.
        """
        number = self._client.incarnation or self._client.claim()
        point = self.resume
        if point is None:
            why = "nothing is stored yet" if self.config.resume else "resume is off"
            logger.info("fresh start as incarnation %d: %s", number, why)
        else:
            logger.info("%s", point.verdict(number, self._versions, notes))
            self._captured_step = point.manifest.step
        journal = Journal(self._tier.root, number, self._client.overflow)
        self._agent = AgentMonitor(self._client, journal, on_look=self._write_cadence)
        self._local = LocalRun(
            self._tier,
            journal,
            self._agent,
            number=number,
            progress=self._progress(self._captured_step or 0),
            committed=point.committed if point is not None else {},
            overflow=self._client.overflow,
        )
        self._writer = CheckpointWriter(self._tier, self._snapshotter, number=number, prepare=self._local.prepare)
        self._agent.start()
        self.signals.install(signals)
        self._pacer.step_started()

    # -- while training ------------------------------------------------------------------------------------

    def step_started(self) -> None:
        """A step begins: ends a pause."""
        self._pacer.step_started()

    def before_optimizer_step(self) -> None:
        """The gate: returns when the snapshot being taken no longer needs the live tensors."""
        self._pacer.gate_passed(self._snapshotter.gate())

    def step_completed(self, step: int) -> None:
        """An optimizer step is done: count useful time. Raises FencedError if a newer life exists."""
        writer, agent, local = self._running()
        if self._fence or agent.fence:
            raise FencedError(self._fence or agent.fence)
        uploads = [agent.uploads.popleft() for _ in range(len(agent.uploads))]
        self._pacer.step_completed(is_busy=writer.is_busy or agent.pending_s is not None, uploads=uploads)
        local.write_progress(self._progress(step))

    def pause(self) -> None:
        """What follows (an evaluation, the trainer's own save) is not useful training time."""
        self._pacer.pause()

    def at_boundary(self, capture: Callable[[], Capture], *, is_required: bool = False) -> None:
        """State is consistent between two steps: take a checkpoint if one is due, stop if preempted.

        capture: called only if a snapshot is taken. is_required: take one now, waiting for the one in flight.
        Raises Preempted after a notice, once the checkpoint is as durable as the grace period allows.
        """
        writer, agent, _ = self._running()
        if self.signals.noticed_at is not None:
            self._stop(capture)
        if not is_required:
            waiting_s = agent.pending_s or 0.0
            is_due = self._pacer.is_due(upload_pending_s=waiting_s, hinted_unix_s=agent.hinted_unix_s)
            if writer.is_busy or not is_due:
                return
        writer.wait()
        self._snapshot(capture)

    def _snapshot(self, capture: Callable[[], Capture]) -> None:
        writer, _, local = self._running()
        self.before_optimizer_step()  # two boundaries without a step in between: the gate is still closed
        began = time.perf_counter()
        content = capture()
        if content.step == self._captured_step and not local.is_lost(local.committed.get(content.step)):
            return
        snapshot = self._snapshotter.take(content.files)
        writer.submit(snapshot, self._manifest(content), self._written)
        self._captured_step = content.step
        self._pacer.taken(time.perf_counter() - began)

    def _manifest(self, content: Capture) -> Manifest:
        assert self._client.incarnation is not None and self._local is not None
        pins = self._local.committed.get(content.pinned_step) if content.pinned_step is not None else None
        return Manifest(
            run=self.config.run,
            name=CheckpointName(self._client.incarnation, content.step),
            epoch=content.epoch,
            useful_s=round(self._pacer.useful_s, 3),
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
            self._fence = str(written.error)
        self._failure = written.failure
        _, agent, local = self._running()
        if written.error is not None:
            self._captured_step = None  # this step may be tried again
            return
        manifest = written.manifest
        is_here = local.add(manifest.name)
        durable = agent.newest_durable
        logger.info(
            "checkpoint: step %d, %.1f MB in %.2f s, %s; remote: %s",
            manifest.step,
            manifest.total_bytes / 1e6,
            written.seconds,
            "durable on the local tier" if is_here else "in memory",
            f"step {durable.step}" if durable else "none yet",
        )

    def _write_cadence(self) -> None:
        if self._local is not None:
            self._local.write_cadence(self._pacer.record().to_json())

    def _progress(self, step: int) -> Progress:
        resumed_step = self.resume.manifest.step if self.resume else 0
        failures = self._writer.failures if self._writer else 0
        why = self._local.remote_only if self._local else ""
        return Progress(step, self._pacer.useful_s, resumed_step, failures, self._failure, why)

    def _running(self) -> tuple[CheckpointWriter, AgentMonitor, LocalRun]:
        if self._writer is None or self._agent is None or self._local is None:
            raise RuntimeError("Session.begin() has not been called")
        return self._writer, self._agent, self._local

    # -- end -----------------------------------------------------------------------------------------------

    def _stop(self, capture: Callable[[], Capture]) -> None:
        """Preempted: commit this very step, wait for the remote within the grace period, and leave."""
        writer, agent, local = self._running()
        assert self.signals.noticed_at is not None
        deadline = self.signals.noticed_at + self.config.grace_s

        def commit() -> None:
            self._snapshot(capture)
            writer.wait(max(0.0, deadline - time.monotonic()))

        if writer.wait(max(0.0, deadline - time.monotonic())):
            local.until_it_fits(commit, deadline)
        newest = local.newest
        is_durable = newest is not None and agent.wait_durable(newest, deadline)
        self._end(lives.PREEMPTED)
        logger.warning(
            "preempted: %s; leaving with exit code %d, run the same command again to continue",
            local.describe(newest, is_durable=is_durable),
            self.config.preempt_exit_code,
        )
        raise Preempted(self.config.preempt_exit_code)

    def finish(self, capture: Callable[[], Capture]) -> None:
        """Training is complete: commit the final state and record that it is the end.

        Returns when both are durable locally; `wait_drained` waits for the remote.
        """
        writer, _, local = self._running()
        writer.wait()
        content = capture()
        self._snapshot(lambda: content)
        writer.wait()
        if local.wait_for_room(self.config.drain_timeout_s):
            self._snapshot(lambda: content)
            writer.wait()
        local.mark_complete(content.step, content.max_steps)

    def wait_drained(self) -> None:
        """Wait until everything committed is on the remote, with a progress bar; says so if it does not get there."""
        _, _, local = self._running()
        is_told = self._end(lives.COMPLETED)
        # An agent that could not be told goes on until this process ends: there is nothing to wait for.
        local.wait_drained(self.config.drain_timeout_s if is_told else 0.0, shown(self.config.remote))

    def _end(self, outcome: str) -> bool:
        """Tell the agent how this life ended; only the first word counts. Returns whether it was told."""
        self._write_cadence()
        is_told = self._local.end(outcome) if self._local is not None else False
        if self._agent is not None:
            self._agent.close()
        return is_told

    def close(self, error: BaseException | None = None) -> None:
        """Let go of everything. error: what ended training, None if it returned."""
        self.signals.uninstall()
        self._snapshotter.gate()
        if self._writer is not None:
            self._writer.close()
        self._snapshotter.close()
        if isinstance(error, FencedError):
            self._end(lives.FENCED)
        else:
            self._end(lives.FAILED if isinstance(error, Exception) else lives.STOPPED)
        if self._client.incarnation is None:
            self._client.dismiss()
        if self._local is not None:
            self._local.close()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
