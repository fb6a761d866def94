"""Runs a command life after life, killing it at random moments, and records what each life did.

A kill is SIGKILL to the command's process group: the trainer and its workers die between two instructions, the
agent lives on, as when a process crashes. A lost instance is imitated by killing the agent too and wiping the local
tier. Steps are read from the journal, which survives the kill.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from spot_core.agent.journal import Journal, Progress
from spot_core.errors import ConfigError
from spot_core.store import incarnation
from spot_core.store.posix import PosixTier


@dataclass(frozen=True, slots=True)
class ChaosLife:
    """One life: seconds it lasted, how it ended, and its progress if it claimed a life of the run."""

    lived_s: float
    ending: str
    exit_code: int
    progress: Progress | None

    @property
    def executed_steps(self) -> int:
        return self.progress.step - self.progress.resumed_step if self.progress else 0


@dataclass(frozen=True, slots=True)
class ChaosReport:
    """All lives of a rehearsal, oldest first; the last one finished unless `failed_code` is set."""

    lives: tuple[ChaosLife, ...]
    failed_code: int | None = None

    def lost_steps(self, index: int) -> int:
        """Steps that life `index` executed and a later one had to repeat."""
        progress = self.lives[index].progress
        later = next((life.progress for life in self.lives[index + 1 :] if life.progress), None)
        return max(0, progress.step - later.resumed_step) if progress and later else 0

    @property
    def wall_s(self) -> float:
        return sum(life.lived_s for life in self.lives)

    @property
    def executed_steps(self) -> int:
        return sum(life.executed_steps for life in self.lives)

    @property
    def total_lost_steps(self) -> int:
        return sum(self.lost_steps(index) for index in range(len(self.lives)))

    @property
    def goodput(self) -> float:
        """Training time that counted over the time all lives took."""
        last = next((life.progress for life in reversed(self.lives) if life.progress), None)
        return last.useful_s / self.wall_s if last and self.wall_s else 0.0


def rehearse(
    command: Sequence[str],
    *,
    run_folder: Path | None,
    kill_every_s: float,
    kills: int,
    wipes: Collection[int],
    rng: random.Random,
) -> ChaosReport:
    """Run `command` until it finishes, killing its first `kills` lives.

    run_folder: the run's folder on the local tier, for the step counts and for wiping. wipes: which kills, counted
    from 1, also lose the instance. Each kill comes after kill_every_s times a uniform draw from 0.5 to 1.5.
    """
    if wipes and run_folder is None:
        raise ConfigError("wiping needs the local tier's folder: pass --local (or set SPOT_LOCAL) and --remote")
    lives: list[ChaosLife] = []
    while True:
        number = len(lives) + 1
        before = _newest(run_folder)
        delay_s = kill_every_s * rng.uniform(0.5, 1.5) if number <= kills else None
        lived_s, code = _live(command, delay_s, is_instance_lost=number in wipes)
        progress = _progress(run_folder, before)
        was_killed = delay_s is not None and code == -signal.SIGKILL
        ending = "finished" if code == 0 else "preempted" if not was_killed else "killed"
        if was_killed and number in wipes:
            assert run_folder is not None
            shutil.rmtree(run_folder, ignore_errors=True)
            ending = "killed, local tier wiped"
        lives.append(ChaosLife(lived_s, ending, code, progress))
        if code == 0:
            return ChaosReport(tuple(lives))
        if not was_killed and code != 75:
            return ChaosReport(tuple(lives), failed_code=code)


def _live(command: Sequence[str], delay_s: float | None, *, is_instance_lost: bool) -> tuple[float, int]:
    began = time.monotonic()
    process = subprocess.Popen(command, start_new_session=True)
    try:
        process.wait(delay_s)
    except subprocess.TimeoutExpired:
        # Listed before the kill: orphans no longer show whose they were.
        family = psutil.Process(process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if is_instance_lost:
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(family, timeout=5)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        raise
    return time.monotonic() - began, process.returncode


def _newest(run_folder: Path | None) -> int:
    return incarnation.newest(PosixTier(run_folder)) if run_folder else 0


def _progress(run_folder: Path | None, before: int) -> Progress | None:
    """Where the life that just ended got to; None if it never claimed one."""
    if run_folder is None:
        return None
    number = _newest(run_folder)
    return Journal(run_folder, number).read_progress() if number > before else None
