"""A session: one life of a run, as the trainer sees it. Adapters hold one and tell it where steps begin and end.

    session = open_session(config, identity, device=…)     the agent checks, restores and claims
    session.resume                                         what to load, verified, on the local tier
    session.begin()                                        training starts
    loop: session.step_started(); …; session.before_optimizer_step(); optimizer.step();
          session.step_completed(step); session.at_boundary(capture)
    session.finish(capture); session.wait_drained()        training is complete
    session.close(error)                                   always

Threads: all public methods on the training thread. Those of the copy, the writer and so on never hold up a step.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from spot_core.agent import lives
from spot_core.agent.client import AgentClient, OpenedRun
from spot_core.agent.journal import Journal, Progress
from spot_core.agent.local_run import LocalRun
from spot_core.agent.monitor import AgentMonitor
from spot_core.checkpointing import Checkpointer
from spot_core.config import SpotConfig
from spot_core.emergency import Action, EmergencyPath
from spot_core.errors import FencedError, Preempted, shown
from spot_core.handover import Capture, ResumePoint, certain
from spot_core.notice.signals import SignalWatcher, of_user
from spot_core.pacing import Pacer
from spot_core.ranks.leader import Alone
from spot_core.report import loggers
from spot_core.snapshot.capture import Snapshotter
from spot_core.stand_in import StandIn
from spot_core.store.identity import RunIdentity

logger = logging.getLogger(__name__)


class Session:
    """One life of a run. Make it with `opening.open_session`."""

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
        ranks: Alone,
    ) -> None:
        self.config, self._identity, self._client = config, identity, client
        self._opened, self._tier, self._ranks = opened, client.tier, ranks
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
        self.signals, self._emergency = SignalWatcher(), EmergencyPath(config.grace_s)
        self._stand_in = StandIn(self._act_instead, self.signals, may_exit=config.on_preempt == "exit")
        self._local: LocalRun | None = None
        self._checkpoints: Checkpointer | None = None
        self._agent: AgentMonitor | None = None

    # -- start ---------------------------------------------------------------------------------------------

    @property
    def is_claimed(self) -> bool:
        """Whether this life is one of the run: not where nothing is left to do."""
        return self._client.incarnation is not None

    @property
    def planned_steps(self) -> int | None:
        """Steps that training was to last, of a run that is complete."""
        return self._opened.max_steps

    def is_finished(self, max_steps: int | None) -> bool:
        """Whether training ended at the restored checkpoint and was to last as long: nothing is left to do."""
        return not self.is_claimed and self.planned_steps == max_steps

    @property
    def has_begun(self) -> bool:
        """Whether training started under this session."""
        return self._local is not None

    def begin(self, *, notes: tuple[str, ...] = (), signals: Mapping[signal.Signals, Any] | None = None) -> None:
        """Training starts: claim a life if that is still to be done, say where it resumes, watch for signals.

        notes: reasons why this resume is not bit-exact. signals: what announces a preemption, each with the handler
        to call after ours; those of the configuration with their present ones by default.
        """
        number = self._client.incarnation or self._client.claim()
        point = self.resume
        if point is None:
            why = "nothing is stored yet" if self.config.resume else "resume is off"
            logger.info("fresh start as incarnation %d: %s", number, why)
        else:
            logger.info("%s", point.verdict(number, self._versions, notes))
        resumed_step = point.manifest.step if point is not None else None
        journal = Journal(self._tier.root, number, self._client.overflow)
        self._agent = AgentMonitor(self._client, journal, on_look=self._write_cadence)
        self._local = LocalRun(
            self._tier,
            journal,
            self._agent,
            number=number,
            progress=self._progress(resumed_step or 0),
            committed=point.committed if point is not None else {},
            overflow=self._client.overflow,
        )
        self._checkpoints = Checkpointer(
            self.config.run,
            self._identity,
            self._snapshotter,
            self._tier,
            self._local,
            self._agent,
            number=number,
            captured_step=resumed_step,
            versions=self._versions,
            base_fingerprint=self._base_fingerprint,
        )
        self._agent.start()
        self._stand_in.start()
        self.signals.install(signals if signals is not None else of_user(self.config.signal_numbers))
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
        checkpoints, agent, local = self._running()
        if checkpoints.fence or agent.fence:
            raise FencedError(checkpoints.fence or agent.fence)
        uploads = [agent.uploads.popleft() for _ in range(len(agent.uploads))]
        self._pacer.step_completed(is_busy=checkpoints.is_busy or agent.pending_s is not None, uploads=uploads)
        local.made_step(lambda: self._progress(step))

    def rests(self, capture: Callable[[], Capture]) -> None:
        """Nothing that `capture` reads changes from here on: another thread may call it until `moves` or a boundary."""
        if self._ranks.is_alone:  # several leave together, at a boundary
            self._stand_in.rests(capture)

    def moves(self) -> None:
        """The rest is over, a step begins. Raises Preempted if its last checkpoint was taken meanwhile."""
        self._stand_in.moves()
        self._snapshotter.moves()

    def pause(self) -> None:
        """What follows (an evaluation, the trainer's own save) is not useful training time."""
        self._pacer.pause()

    def at_boundary(self, capture: Callable[[], Capture], *, is_required: bool = False) -> None:
        """State is consistent between two steps: take a checkpoint if one is due, stop if preempted.

        capture: called only if a snapshot is taken. is_required: take one now, waiting for the one in flight.
        Raises Preempted after a notice, once the checkpoint is as durable as the grace period allows.
        """
        with self._stand_in:
            checkpoints, _, _ = self._running()
            action = self._ranks.due()
            if action is Action.NONE:
                action = self._ranks.agree(self._wish())
            if action is Action.NONE and is_required:
                action = Action.SAVE
            if action in {Action.LEAVE, Action.HOLD}:
                self._stop(capture if action is Action.LEAVE else None)
            if action in {Action.SAVE, Action.COPY}:
                checkpoints.wait()
                self._take(capture, may_fail=action is Action.SAVE and not is_required)
            if action is Action.COPY and checkpoints.captured_step is not None:
                self._emergency.copied(checkpoints.captured_step)

    def _wish(self) -> Action:
        checkpoints, agent, _ = self._running()
        action = self._meet_notice()
        if action is not Action.NONE:
            return action
        is_due = self._pacer.is_due(upload_pending_s=agent.pending_s or 0.0, hinted_unix_s=agent.hinted_unix_s)
        return Action.SAVE if (is_due or checkpoints.is_owed) and not checkpoints.is_busy else Action.NONE

    def _act_instead(self, capture: Callable[[], Capture]) -> None:
        """The thread that stands in: raises Preempted once it has left, returns while there is time or no notice."""
        _, agent, _ = self._running()
        signalled_at, rescue_s = self.signals.noticed_at, self._pacer.rescue_s
        if self._emergency.is_last_call(agent.notice, signalled_at, rescue_s):
            self._meet_notice()
            fits = self._emergency.deadline is not None and self._emergency.deadline - time.monotonic() >= rescue_s
            if fits or signalled_at is not None:
                self._stop(capture if fits else None)

    def _meet_notice(self) -> Action:
        _, agent, local = self._running()
        return self._emergency.at_boundary(
            agent.notice,
            self._ranks.signalled_at(self.signals.noticed_at),
            costs=lambda: (self._pacer.rescue_s + self._ranks.delay_steps * self._pacer.step_s, self._pacer.step_s),
            is_durable=lambda step: local.committed.get(step) in agent.durable,
        )

    def _take(self, capture: Callable[[], Capture], *, may_fail: bool = False) -> None:
        """may_fail: another one comes soon, so that what `capture` assumes may turn out wrong."""
        checkpoints, _, _ = self._running()
        looked_up = capture if may_fail and self._ranks.is_alone else partial(certain, capture)
        self.before_optimizer_step()  # two boundaries without a step in between: the gate is still closed
        stall_s = checkpoints.take(lambda: self._ranks.completed(looked_up()), useful_s=self._pacer.useful_s)
        if stall_s is not None:
            self._pacer.taken(stall_s)

    def _write_cadence(self) -> None:
        if self._local is not None:
            self._local.write_cadence(self._pacer.record().to_json())

    def _progress(self, step: int) -> Progress:
        resumed_step = self.resume.manifest.step if self.resume else 0
        failures, failure = (self._checkpoints.failures, self._checkpoints.failure) if self._checkpoints else (0, "")
        why = self._local.remote_only if self._local else ""
        return Progress(step, self._pacer.useful_s, resumed_step, failures, failure, why)

    def _running(self) -> tuple[Checkpointer, AgentMonitor, LocalRun]:
        if self._checkpoints is None or self._agent is None or self._local is None:
            raise RuntimeError("Session.begin() has not been called")
        return self._checkpoints, self._agent, self._local

    # -- end -----------------------------------------------------------------------------------------------

    def _stop(self, capture: Callable[[], Capture] | None) -> None:
        """Preempted: commit this very step, wait for the remote until the end, and leave.

        capture: None if only what is on its way is to be waited for.
        """
        checkpoints, agent, local = self._running()
        assert self._emergency.deadline is not None
        deadline = self._emergency.deadline

        def commit() -> None:
            if capture is not None:
                self._take(capture)
            checkpoints.wait(max(0.0, deadline - time.monotonic()))

        if checkpoints.wait(max(0.0, deadline - time.monotonic())):
            local.until_it_fits(commit, deadline)
        loggers.preempting()
        newest = local.newest
        is_durable = newest is not None and agent.wait_durable(newest, deadline)
        self._end(lives.PREEMPTED)
        logger.warning(
            "preempted: %s; leaving with exit code %d, run the same command again to continue",
            local.describe(newest, is_durable=is_durable),
            self.config.preempt_exit_code,
        )
        raise Preempted(self.config.preempt_exit_code)

    def end_if_signalled(self, error: Exception) -> None:
        """Training broke off: raise Preempted if that is since the signal reached the loader's workers too."""
        if self._checkpoints is None or not self.signals.has_ended_workers(error):
            return
        capture = self._stand_in.capture
        with self._stand_in:
            logger.warning("the signal ended the data loader's workers too: %s", error)
            self._meet_notice()
            self._stop(capture if self._ranks.is_alone else None)

    def finish(self, capture: Callable[[], Capture]) -> None:
        """Training is complete: commit the final state and record that it is the end.

        Returns when both are durable locally; `wait_drained` waits for the remote.
        """
        checkpoints, _, local = self._running()
        self.moves()
        checkpoints.wait()
        content = certain(capture)
        self._take(lambda: content)
        checkpoints.wait()
        if local.wait_for_room(self.config.drain_timeout_s):
            self._take(lambda: content)
            checkpoints.wait()
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
        try:
            self._close(error)
        finally:  # until then another signal changes nothing
            self.signals.uninstall(is_leaving=isinstance(error, Preempted) and self.config.on_preempt == "exit")

    def _close(self, error: BaseException | None) -> None:
        self._snapshotter.gate()
        if self._checkpoints is not None:
            self._checkpoints.close()
        self._snapshotter.close()
        ended = lives.FAILED if isinstance(error, Exception) else lives.STOPPED
        self._end(lives.FENCED if isinstance(error, FencedError) else ended)
        if self._client.incarnation is None:
            self._client.dismiss()
        if self._local is not None:
            self._local.close()
        self._stand_in.close()
        self._ranks.close()
