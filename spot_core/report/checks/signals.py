"""Whether a signal that announces a preemption would reach a training started as this process was."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spot_core.config import SpotConfig
from spot_core.report.checks.finding import WARNING, Area, Finding
from spot_core.report.units import duration

logger = logging.getLogger(__name__)

AREA = Area("signals")

_PROC = Path("/proc")
_SHELLS = {"sh", "bash", "dash", "ash", "zsh", "ksh", "mksh", "busybox"}
_TORCHRUN_MODULES = {"torch.distributed.run", "torch.distributed.launch"}
# What torchrun passes on to its workers, and how long it then waits for them unless it is told otherwise.
_TORCHRUN_FORWARDS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
_TORCHRUN_WAITS_S = 30.0
_WAITS = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
_EXEC = "let the shell become the training: `exec python train.py` as its last command"
_INIT = "or start the container with an init: docker run --init, or tini as the entrypoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process as /proc shows it. ignored, blocked, caught: sets of signals, a bit each."""

    pid: int
    parent: int
    argv: tuple[str, ...]
    ignored: int = 0
    blocked: int = 0
    caught: int = 0

    @property
    def is_script(self) -> bool:
        """Whether it is a shell that runs a command or a file, as opposed to one that a person types into."""
        return self.is_shell and any(not arg.startswith("-") or arg == "-c" for arg in self.argv[1:])

    @property
    def is_shell(self) -> bool:
        return bool(self.argv) and Path(self.argv[0]).name.lstrip("-") in _SHELLS

    @property
    def is_torchrun(self) -> bool:
        return any(Path(arg).name == "torchrun" for arg in self.argv[:2]) or bool(_TORCHRUN_MODULES & {*self.argv[:4]})

    def catches(self, signum: int) -> bool:
        return _has(self.caught, signum)

    def __str__(self) -> str:
        # Not the whole command line: it may hold secrets.
        name = "torchrun" if self.is_torchrun else Path(self.argv[0]).name or "?"
        first = self.argv[1] if self.is_script else ""
        rest = " …" if self.argv[2:] and first else ""
        return f"`{name}{' ' if first else ''}{first}{rest}` (process {self.pid})"


def check_signals(config: SpotConfig, environ: Mapping[str, str], proc: Path = _PROC) -> Iterator[Finding]:
    me = read_process("self", proc)
    if me is None:
        yield AREA.skipped("signals", f"{proc} does not tell about processes here")
        return
    above = ancestors(me, proc)
    wanted = config.signal_numbers
    yield from _first_process([me, *above], wanted, proc)
    yield from _shells(above, wanted)
    yield _delivery(me, wanted)
    for each in above:
        if each.is_torchrun:
            yield from _torchrun(each, config, environ)


def warn_if_unheard(config: SpotConfig) -> None:
    """At a training's start: say so where a shell is the container's first process and keeps its signals."""
    me, first = read_process(os.getpid(), _PROC), read_process(1, _PROC)
    if me is None or first is None or not first.is_shell:
        return
    for finding in _first_process([me, *ancestors(me, _PROC)], config.signal_numbers, _PROC):
        if finding.status == WARNING:
            logger.warning("%s. To change that: %s", finding.detail, finding.fix)


def torchrun_waits_s(environ: Mapping[str, str], proc: Path = _PROC) -> float | None:
    """Seconds from a signal until a torchrun above this process kills its workers; None without one."""
    me = read_process("self", proc)
    found = [each for each in (ancestors(me, proc) if me is not None else []) if each.is_torchrun]
    return min((_waits_s(each, environ) for each in found), default=None)


def read_process(pid: int | str, proc: Path) -> Process | None:
    """None if there is no such process, or none that may be seen."""
    try:
        status = (proc / str(pid) / "status").read_text(errors="replace")
        line = (proc / str(pid) / "cmdline").read_bytes().decode(errors="replace")
        fields = {name: value.strip() for name, _, value in (row.partition(":") for row in status.splitlines())}
        return Process(
            pid=int(fields["Pid"]),
            parent=int(fields["PPid"]),
            argv=tuple(line.rstrip("\0").split("\0")),
            ignored=int(fields["SigIgn"], 16),
            blocked=int(fields["SigBlk"], 16),
            caught=int(fields["SigCgt"], 16),
        )
    except (OSError, ValueError, KeyError):
        return None


def ancestors(process: Process, proc: Path) -> list[Process]:
    """Those that may be seen, nearest first."""
    found: list[Process] = []
    parent = read_process(process.parent, proc) if process.parent else None
    while parent is not None and parent.pid not in {each.pid for each in found}:
        found.append(parent)
        parent = read_process(parent.parent, proc) if parent.parent else None
    return found


def _first_process(lineage: Sequence[Process], wanted: Sequence[signal.Signals], proc: Path) -> Iterator[Finding]:
    """A signal for a container goes to its first process, and to no other."""
    what, first = "first process", read_process(1, proc)
    if first is None:
        return
    lost = [signum for signum in wanted if not first.catches(signum)]
    if first.is_shell and lost:
        yield AREA.warning(
            what,
            f"the first process is a shell, {first}: {_names(lost)} for the container ends there, and the training is "
            "killed without notice",
            f"{_EXEC}, {_INIT}",
        )
    elif first.pid not in {each.pid for each in lineage}:
        yield AREA.warning(
            what,
            f"this process was started from outside its container (docker exec, kubectl exec): {_names(wanted)} for "
            f"the container goes to {first}",
            "start the training as the container's command",
        )
    else:
        yield AREA.ok(what, f"{first} {'has a trap' if first.is_shell else 'is no shell'}")


def _shells(above: Sequence[Process], wanted: Sequence[signal.Signals]) -> Iterator[Finding]:
    scripts = [each for each in above if each.pid != 1 and each.is_script]
    deaf = [each for each in scripts if not all(each.catches(signum) for signum in wanted)]
    if deaf:
        yield AREA.warning(
            "shells above",
            f"{', '.join(map(str, deaf[:3]))}: {_names(wanted)} that is sent to the shell alone does not reach what "
            "it runs",
            f"{_EXEC}; or have the whole group signalled",
        )
    else:
        yield AREA.ok("shells above", "no shell stands between that keeps a signal to itself")


def _delivery(me: Process, wanted: Sequence[signal.Signals]) -> Finding:
    what = "delivery"
    if blocked := [signum for signum in wanted if _has(me.blocked, signum)]:
        return AREA.problem(
            what,
            f"{_names(blocked)} is blocked in whatever is started from here: it never arrives",
            "unblock it in the program that starts this: signal.pthread_sigmask, sigprocmask",
        )
    if ignored := [signum for signum in wanted if _has(me.ignored, signum)]:
        return AREA.warning(
            what,
            f"{_names(ignored)} is ignored in whatever is started from here: a training takes it over only once "
            "its callback is there",
            f"start it without `trap '' {ignored[0].name.removeprefix('SIG')}` and the like",
        )
    return AREA.ok(what, f"{_names(wanted)} is neither ignored nor blocked")


def _torchrun(torchrun: Process, config: SpotConfig, environ: Mapping[str, str]) -> Iterator[Finding]:
    waits_s = _waits_s(torchrun, environ)
    kills = f"{torchrun} kills its workers {duration(waits_s)} after a signal"
    if waits_s < config.grace_s:
        yield AREA.warning(
            "torchrun",
            f"{kills}, grace_s is {config.grace_s:g}",
            f"export {_WAITS}={math.ceil(config.grace_s)}, or set SPOT_GRACE_S={math.floor(waits_s)}",
            shutdown_timeout_s=waits_s,
        )
    else:
        yield AREA.ok("torchrun", kills, shutdown_timeout_s=waits_s)
    if kept := [signum for signum in config.signal_numbers if signum not in _TORCHRUN_FORWARDS]:
        yield AREA.warning(
            "torchrun",
            f"it does not pass {_names(kept)} on to its workers",
            "have SIGTERM sent, or the workers signalled themselves",
        )


def _waits_s(torchrun: Process, environ: Mapping[str, str]) -> float:
    told = [environ.get(_WAITS, "")]
    for index, arg in enumerate(torchrun.argv):
        name, separator, value = arg.partition("=")
        if name in {"--shutdown_timeout", "--shutdown-timeout"}:
            told.insert(0, value if separator else "".join(torchrun.argv[index + 1 : index + 2]))
    return next((float(text) for text in told if text.strip().isdecimal()), _TORCHRUN_WAITS_S)


def _has(signals: int, signum: int) -> bool:
    return bool(signals >> (signum - 1) & 1)


def _names(signals: Sequence[signal.Signals]) -> str:
    return ", ".join(signum.name for signum in signals)
