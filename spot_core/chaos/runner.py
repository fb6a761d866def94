"""Runs a command life after life, ends each as planned, and records what it did.

A kill is SIGKILL to the command's process group: the trainer and its workers die between two instructions, the
agent lives on, as when a process crashes. A crash takes the trainer only. A lost instance is imitated by killing the
agent too and wiping the local tier. Steps are read from the journal, which survives the kill.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import psutil

from spot_core.agent.journal import Journal, Progress
from spot_core.chaos.metadata_service import MetadataServer
from spot_core.chaos.plan import Mode, PlannedKill
from spot_core.chaos.report import ChaosLife, ChaosReport
from spot_core.errors import ConfigError
from spot_core.store import incarnation
from spot_core.store.posix import PosixTier

_TERMINATED = {-signal.SIGTERM, 128 + signal.SIGTERM}
# All that a life started has it in its environment, orphans and the agent too.
_MARK = "SPOT_CHAOS_LIFE"
_DYING_S = 5.0


def rehearse(
    command: Sequence[str],
    *,
    kills: Sequence[PlannedKill],
    run_folder: Path | None = None,
    server: MetadataServer | None = None,
    preempt_exit_code: int = 75,
) -> ChaosReport:
    """Run `command` until it finishes or fails, ending its first lives by `kills`.

    run_folder: the run's folder on the local tier, for the step counts and for wiping. server: announces what is
    announced, and is the metadata service of each life; without one a notice is SIGTERM to the process group.
    preempt_exit_code: how a life that was preempted exits by itself.
    """
    if run_folder is None and any(kill.mode is Mode.INSTANCE for kill in kills):
        raise ConfigError("wiping needs the local tier's folder: pass --local (or set SPOT_LOCAL) and --remote")
    lives: list[ChaosLife] = []
    while True:
        kill = kills[len(lives)] if len(lives) < len(kills) else None
        before = _newest(run_folder)
        life = _Life(command, kill, server, has_agent=run_folder is not None, preempt_exit_code=preempt_exit_code)
        life.run()
        is_lost = kill is not None and kill.mode is Mode.INSTANCE and life.is_preempted
        if is_lost:
            life.lose_instance()
        progress = _progress(run_folder, before)
        if is_lost:
            assert run_folder is not None
            shutil.rmtree(run_folder, ignore_errors=True)
        lives.append(life.record(progress, is_wiped=is_lost))
        if life.code == 0:
            return ChaosReport(tuple(lives))
        if not life.is_killed and not life.left_preempted:
            return ChaosReport(tuple(lives), failed_code=life.code)
        if server is not None and life.is_preempted:
            server.new_instance()
        elif server is not None and life.is_noticed:
            server.withdraw()


class _Life:
    """One run of the command, to the end that was planned for it or came by itself.

    has_agent: whether its trainer starts one sooner or later.
    """

    def __init__(
        self,
        command: Sequence[str],
        kill: PlannedKill | None,
        server: MetadataServer | None,
        *,
        has_agent: bool,
        preempt_exit_code: int,
    ) -> None:
        self._kill, self._server, self._has_agent = kill, server, has_agent
        self._preempt_exit_code = preempt_exit_code
        self._mark = uuid.uuid4().hex
        environ = {**os.environ, **(server.environ if server else {}), _MARK: self._mark}
        self._began = time.monotonic()
        try:
            self._process = subprocess.Popen(command, start_new_session=True, env=environ)
        except OSError as error:
            raise ConfigError(f"the command cannot be started: {error}") from error
        self._lived_s = 0.0
        self._deadline: float | None = None
        self._notice_s: float | None = None
        self._left_s: float | None = None
        self._is_struck = self._is_withdrawn = False

    @property
    def code(self) -> int:
        return self._process.returncode

    @property
    def is_noticed(self) -> bool:
        """Whether a notice stood when it ended."""
        return self._notice_s is not None and not self._is_withdrawn

    @property
    def is_killed(self) -> bool:
        return self._is_struck and self.code not in {0, self._preempt_exit_code}

    @property
    def left_preempted(self) -> bool:
        """Whether it ended by itself as a preempted run does; a signal that it does not handle ends it as well."""
        is_signalled = self._notice_s is not None and self._server is None
        return self.code == self._preempt_exit_code or (is_signalled and self.code in _TERMINATED)

    @property
    def is_preempted(self) -> bool:
        """Whether the instance is taken away: by the kill, or at the deadline that the command did not wait for."""
        if self._kill is None:
            return False
        if self.is_killed:
            return self._kill.mode is not Mode.CRASH
        return self._left_s is not None and self._kill.withdrawn_at_s is None and self.left_preempted

    def run(self) -> None:
        """Returns when the command has ended."""
        try:
            if self._kill is None:
                self._process.wait()
            else:
                self._carry_out(self._kill)
        except BaseException:
            self._signal_group(signal.SIGTERM)
            raise
        self._lived_s = time.monotonic() - self._began

    def record(self, progress: Progress | None, *, is_wiped: bool) -> ChaosLife:
        words = ["notice withdrawn"] if self._is_withdrawn else []
        if self.code == 0:
            words.append("finished")
        elif self.is_killed:
            words.append("trainer killed" if self._kill and self._kill.mode is Mode.CRASH else "killed")
        else:
            words.append("preempted" if self.left_preempted else "failed")
        if is_wiped:
            words.append("local tier wiped")
        return ChaosLife(
            lived_s=self._lived_s,
            ending=", ".join(words),
            exit_code=self.code,
            progress=progress,
            notice_s=self._notice_s,
            left_s=self._left_s,
            is_withdrawn=self._is_withdrawn,
        )

    def lose_instance(self) -> None:
        """End all that the life left behind; what is announced to end has until the deadline."""
        if self._left_s is not None and self._deadline is not None:
            psutil.wait_procs(self._members(), timeout=max(0.0, self._deadline - time.monotonic()))
        members = self._members()
        for member in members:
            with contextlib.suppress(psutil.Error):
                member.kill()
        psutil.wait_procs(members, timeout=_DYING_S)

    def _carry_out(self, kill: PlannedKill) -> None:
        if kill.notice_at_s is not None:
            if self._ends_by(self._began + kill.notice_at_s):
                return
            self._deadline = self._announce(kill.lead_s)
            if self._ends_by(self._deadline if kill.withdrawn_at_s is None else self._began + kill.withdrawn_at_s):
                self._left_s = max(0.0, self._deadline - time.monotonic())
                return
            if kill.withdrawn_at_s is None or self._server is None:
                self._strike(kill.mode)
                return
            self._server.withdraw()
            self._is_withdrawn = True
        if not self._ends_by(self._began + kill.kill_at_s):
            self._strike(kill.mode)

    def _announce(self, lead_s: float) -> float:
        """Returns the deadline, in monotonic seconds."""
        if self._server is None:
            deadline = time.time() + lead_s
            self._signal_group(signal.SIGTERM)
        else:
            deadline = self._server.announce(lead_s)
        self._notice_s = deadline - time.time()
        return time.monotonic() + self._notice_s

    def _ends_by(self, until: float) -> bool:
        try:
            self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True

    def _strike(self, mode: Mode) -> None:
        self._is_struck = True
        trainer = self._trainer() if mode is Mode.CRASH else None
        if trainer is None:
            self._signal_group(signal.SIGKILL)
        else:
            with contextlib.suppress(psutil.Error):
                trainer.kill()
        self._process.wait()

    def _trainer(self) -> psutil.Process | None:
        """The process that started the agent: the command may be a launcher, such as `sh` or `uv run`.

        None while there is no agent yet: a launcher that dies alone leaves a trainer that goes on.
        """
        if not self._has_agent:
            return psutil.Process(self._process.pid)
        members = {member.pid: member for member in self._members()}
        for member in members.values():
            with contextlib.suppress(psutil.Error):
                if "spot_core.agent" in member.cmdline() and member.ppid() in members:
                    return members[member.ppid()]
        return None

    def _members(self) -> list[psutil.Process]:
        """Every process of this life that runs, whoever its parent is by now."""
        found = psutil.process_iter(["environ"])
        return [process for process in found if (process.info["environ"] or {}).get(_MARK) == self._mark]

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _newest(run_folder: Path | None) -> int:
    return incarnation.newest(PosixTier(run_folder)) if run_folder else 0


def _progress(run_folder: Path | None, before: int) -> Progress | None:
    """Where the life that just ended got to; None if it never claimed one."""
    if run_folder is None:
        return None
    number = _newest(run_folder)
    return Journal(run_folder, number).read_progress() if number > before else None
