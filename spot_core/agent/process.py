"""The agent's main loop: drain, watch the trainer, keep the life's record, and exit when its purpose is over.

Two threads: the main one drains and writes the status; the other writes heartbeats, so that a long upload does
not make the life look dead. SIGTERM does not stop an attached agent: a signal to the whole group must not cost the
drain. It ends by itself once the trainer has ended and everything worth it is durable, or after `LINGER_S` of a
remote that does not answer.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from spot_core.agent import lives
from spot_core.agent.drain import Drain
from spot_core.agent.fleet import FleetMember
from spot_core.agent.journal import AgentStatus, Journal
from spot_core.agent.lives import Life
from spot_core.cadence.interval import MARGIN_S
from spot_core.errors import DeadlineError, FencedError, SpotError
from spot_core.notice.notice import Notice
from spot_core.notice.rebalance import RebalanceHint
from spot_core.notice.watch import Watch
from spot_core.store import layout
from spot_core.store.layout import CheckpointName
from spot_core.store.overflow import Overflow
from spot_core.store.posix import PosixTier
from spot_core.store.tier import Tier

logger = logging.getLogger(__name__)

POLL_S = 0.1
HEARTBEAT_S = 60.0
_SHARE_EVERY_S = 600.0
_HINT_EVERY_S = 5.0
LINGER_S = 900.0
_STATUS_EVERY_S = 0.2
_SHOWN_DRAINS = 50
_LEAVING_S = 5.0
_BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)

EXIT_DRAINED = 0
EXIT_GAVE_UP = 3
EXIT_FENCED = 4


class Agent:
    """The agent of one life.

    life: its record at the start. began: monotonic seconds when it began. drain: what to upload and prune.
    is_trainer_alive: asked about ten times a second. watch: for notices of a preemption. hint: of the instance's
    danger, where the provider gives one.
    fleet: with whom the record is shared, None after a restart: it knows the lives before this one.
    sweep: called once before anything is drained, clears up after earlier lives; None after a restart.
    """

    def __init__(
        self,
        local: PosixTier,
        remote: Tier,
        drain: Drain,
        *,
        life: Life,
        began: float,
        is_trainer_alive: Callable[[], bool],
        overflow: Overflow | None = None,
        watch: Watch | None = None,
        hint: RebalanceHint | None = None,
        fleet: FleetMember | None = None,
        sweep: Callable[[], None] | None = None,
    ) -> None:
        self._local, self._remote, self._drain = local, remote, drain
        self._overflow = overflow or Overflow(None)
        self._is_trainer_alive, self._hint, self._fleet = is_trainer_alive, hint, fleet
        self._watch, self._sweep = watch or Watch([]), sweep
        self._journal = Journal(local.root, life.incarnation, self._overflow)
        self._status = AgentStatus(pid=os.getpid())
        self._status_written = 0.0
        self._reported: str | None = None
        self._ended = threading.Event()
        self._life, self._began = life, began
        self._trainer_ended_at: float | None = None
        self._upload_name: CheckpointName | None = None
        self._upload_began = 0.0

    def run(self) -> int:
        """Work until the purpose is over; returns the exit code."""
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, lambda *_: None)
        heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        heart.start()
        self._watch.start(self._on_notice)
        try:
            code, outcome = self._work()
        finally:
            self._ended.set()
            self._watch.close()
            heart.join(timeout=5)
        self._record(outcome)
        self._share()
        self._status.is_finished = True
        is_told = self._publish(force=True)
        self._give_memory_back(code, is_told=is_told)
        logger.info("life %d ended: %s", self._life.incarnation, outcome)
        return code

    def _work(self) -> tuple[int, str]:
        failures = 0
        self._clear_up()
        while True:
            outcome = self._journal.read_outcome()
            if self._trainer_ended_at is None and (outcome is not None or not self._is_trainer_alive()):
                self._trainer_ended_at = time.monotonic()
                # A commit made between the last look and the end must still be seen below.
                outcome = self._journal.read_outcome()
            try:
                drained = self._drain_one()
                failures = 0
            except FencedError as error:
                logger.warning("%s", error)
                self._status.fence = str(error)
                return EXIT_FENCED, outcome or (lives.FENCED if self._trainer_ended_at is None else lives.DIED)
            except DeadlineError as error:
                logger.info("%s", error)
                drained = True
            except SpotError as error:
                self._report(error)
                failures += 1
                drained = False
            if failures == 0 and not drained and self._trainer_ended_at is not None:
                return EXIT_DRAINED, outcome or lives.DIED
            ended_at = self._trainer_ended_at
            if ended_at is not None and time.monotonic() - ended_at > LINGER_S:
                logger.error("giving up: the remote did not answer for %.0f s after training ended", LINGER_S)
                return EXIT_GAVE_UP, outcome or lives.DIED
            if not drained:
                self._wait(failures)

    def _clear_up(self) -> None:
        if self._sweep is not None:
            try:
                self._sweep()
            except (SpotError, OSError) as error:
                logger.info("what earlier lives left on the remote stays until the next one: %s", error)

    def _drain_one(self) -> bool:
        self._upload_name = None
        is_drained = self._drain.step(self._on_progress, self._on_durable) is not None
        self._note_durable()
        self._status.pending = len(self._drain.pending()) if is_drained else 0
        self._publish(force=is_drained)
        return is_drained

    def _on_durable(self, name: CheckpointName, seconds: float) -> None:
        """Tell before what it supersedes is deleted: a trainer that is about to leave waits for this."""
        self._note_durable()
        self._status.drained[str(name)] = round(seconds, 3)
        for old in list(self._status.drained)[:-_SHOWN_DRAINS]:
            del self._status.drained[old]  # the status is rewritten whole: it must not grow with the run
        self._status.last_failure = self._reported = None
        logger.info("checkpoint %s durable in %s after %.1f s", name, self._remote.url, seconds)
        self._publish(force=True)

    def _note_durable(self) -> None:
        newest = self._drain.newest_durable
        self._status.newest_durable = str(newest) if newest else None
        self._status.durable = [str(name) for name in sorted(self._drain.durable)]
        self._status.draining = None

    def _wait(self, failures: int) -> None:
        """Between looks; after a failure longer and longer, but no longer than the trainer's end is noticed."""
        until = time.monotonic() + (_BACKOFF_S[min(failures, len(_BACKOFF_S)) - 1] if failures else POLL_S)
        alive = self._is_trainer_alive()
        while (now := time.monotonic()) < until:
            time.sleep(min(POLL_S, until - now))
            if failures and alive and not self._is_trainer_alive():
                return

    def _on_progress(self, name: CheckpointName, done: int, total: int) -> None:
        self._status.draining, self._status.done_bytes, self._status.total_bytes = str(name), done, total
        if self._upload_name != name:
            self._upload_name, self._upload_began = name, time.monotonic()
        self._publish()
        self._set_aside_if_better(name, done, total)

    def _set_aside_if_better(self, name: CheckpointName, done: int, total: int) -> None:
        """Before an announced end: raise DeadlineError if only a newer checkpoint can still become durable.

        What is finished first is safe for sure: it is set aside only where both do not fit and the newer one does.
        """
        notice = self._watch.notice
        if notice is None or not done or self._upload_name != name:
            return
        rate = done / max(1e-3, time.monotonic() - self._upload_began)
        left_s = notice.deadline_unix_s - time.time() - MARGIN_S
        rest_s, whole_s = (total - done) / rate, total / rate
        if whole_s <= left_s < rest_s + whole_s and (newest := self._drain.pending()[:1]) and newest[0] > name:
            raise DeadlineError(
                f"the upload of {name} is set aside: {newest[0]} is newer, and only one of them fits into the "
                f"{left_s:.0f} s that are left"
            )

    def _on_notice(self, notice: Notice | None) -> None:
        """Watcher's thread: tell the trainer."""
        if notice is None:
            logger.warning("the notice of a preemption was withdrawn")
        else:
            left_s = notice.deadline_unix_s - time.time()
            logger.warning("notice of a preemption from %s: %.0f s are left", notice.source, left_s)
        try:
            self._journal.write_notice(notice)
        except (OSError, SpotError) as error:
            logger.error("the trainer could not be told of the notice: %s", error)

    def _report(self, error: SpotError) -> None:
        """Count every failure, log each new cause once."""
        self._status.failures += 1
        self._status.last_failure = str(error)
        self._status.draining = None
        self._status.pending = max(1, self._status.pending)
        if type(error).__name__ != self._reported:
            self._reported = type(error).__name__
            logger.warning("drain failed, training goes on and the drain is retried: %s", error)
        self._publish(force=True)

    def _publish(self, *, force: bool = False) -> bool:
        """Write the status, now and then. Returns whether it is in the local folder now."""
        now = time.monotonic()
        if force or now - self._status_written >= _STATUS_EVERY_S:
            self._status_written = now
            try:
                return self._journal.write_status(self._shown())
            except (OSError, SpotError) as error:
                logger.debug("status not written: %s", error)
        return False

    def _give_memory_back(self, code: int, *, is_told: bool) -> None:
        """Delete this life's part of the overflow, but for what is durable nowhere: that stays until the next boot."""
        number = self._life.incarnation
        kept: list[CheckpointName] = []
        if code == EXIT_GAVE_UP:
            durable = self._drain.newest_durable
            kept = [name for name in self._overflow.names() if durable is None or name > durable]
            if kept:
                names = ", ".join(map(str, kept))
                logger.error("%s: only in memory (%s), until the next boot", names, self._overflow.folder)
        # A trainer that could not be told otherwise reads the last status there, and clears up after that.
        is_read_there = not is_told and self._is_trainer_alive()
        deadline = time.monotonic() + _LEAVING_S
        while not self._overflow.remove(number, but=kept, is_journal_kept=is_read_there):
            if time.monotonic() > deadline:
                return  # another life's agent holds it, and deletes it in the end
            time.sleep(POLL_S)

    def _shown(self) -> AgentStatus:
        """The status with what the trainer could not commit locally: `spot status` shows one list of failures."""
        progress = self._journal.read_progress()
        return replace(
            self._status,
            failures=self._status.failures + (progress.failures if progress else 0),
            last_failure=self._status.last_failure or (progress.failure if progress else "") or None,
            is_drain_failing=self._status.last_failure is not None,
        )

    # -- the life's record ---------------------------------------------------------------------------------

    def _beat(self) -> None:
        self._record(lives.RUNNING)
        if self._fleet is not None:
            self._fleet.share_all()
        recorded = shared = time.monotonic()
        every_s = HEARTBEAT_S if self._hint is None else _HINT_EVERY_S
        while not self._ended.wait(every_s):
            if self._hint is not None:
                self._status.hinted_unix_s = self._hint.noticed_unix_s()
            if time.monotonic() - recorded >= HEARTBEAT_S:
                self._record(lives.RUNNING)
                recorded = time.monotonic()
            if time.monotonic() - shared >= _SHARE_EVERY_S:
                self._share()
                shared = time.monotonic()

    def _share(self) -> None:
        if self._fleet is not None:
            self._fleet.share(self._life)

    def _record(self, outcome: str) -> None:
        progress = self._journal.read_progress()
        until = self._trainer_ended_at or time.monotonic()  # what it drains after that is not life of the job
        self._life = replace(
            self._life,
            heartbeat=time.time(),
            lived_s=round(max(0.0, until - self._began), 3),
            outcome=outcome,
            step=progress.step if progress else self._life.step,
            useful_s=round(progress.useful_s, 3) if progress else self._life.useful_s,
            resumed_step=progress.resumed_step if progress else self._life.resumed_step,
            newest_durable=self._status.newest_durable,
            cadence=self._journal.read_cadence() or self._life.cadence,
        )
        for tier in (self._local, self._remote):
            try:
                tier.replace(layout.life(self._life.incarnation), self._life.to_json())
            except (SpotError, OSError) as error:
                logger.debug("heartbeat not written to %s: %s", tier.url, error)
