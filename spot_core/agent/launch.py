"""Starts agent processes, before anybody knows what to ask them.

What opens a place takes time: to load and to prepare, for s3 about a second, and to look at. The first is done while
the model is made (`start_early`), the second while its frozen base is read (`EarlyAgent`). What is asked comes on
standard input, a JSON object a line.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from spot_core.config import SpotConfig
from spot_core.environment import STORAGE_OPTIONS
from spot_core.keys import SIGNING_KEY

AgentProcess = subprocess.Popen[str]

# Which of several processes this is, as torchrun, Lightning, srun and mpirun tell it.
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


class _Waiting:
    """The agent of this process that nobody has asked for a run yet; one at most. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: AgentProcess | None = None
        self._schemes: frozenset[str] = frozenset()
        self._owner = 0
        atexit.register(self.end)

    def put(self, process: AgentProcess, schemes: frozenset[str]) -> None:
        """Have `process` wait, in the place of the one before."""
        self.end()
        with self._lock:
            self._process, self._schemes, self._owner = process, schemes, os.getpid()

    def has(self, schemes: frozenset[str]) -> bool:
        with self._lock:
            return self._is_fit(schemes)

    def take(self, schemes: frozenset[str]) -> AgentProcess | None:
        """The one that has loaded these schemes; it is the caller's from here on."""
        with self._lock:
            if not self._is_fit(schemes):
                return None
            process, self._process = self._process, None
            return process

    def end(self) -> None:
        with self._lock:
            process, self._process = self._process, None
            if process is not None and self._owner == os.getpid():  # a fork has its pipes too, but no say
                end(process)

    def _is_fit(self, schemes: frozenset[str]) -> bool:
        if self._process is None or self._owner != os.getpid():
            return False
        return self._schemes == schemes and self._process.poll() is None


_waiting = _Waiting()


def start_early(config: SpotConfig) -> None:
    """Have an agent load what the URLs of `config` need, if that takes time, and look up credentials.

    It waits for whoever asks first; one that is never asked ends with this process. Ranks other than 0 start none.
    """
    schemes = _schemes(config)
    is_first = all(os.environ.get(name, "0").strip() in {"", "0"} for name in _RANKS)
    if schemes and is_first and not _waiting.has(schemes):
        process = _start(schemes)
        ask(process, "prepare", place(config))
        _waiting.put(process, schemes)


def start(config: SpotConfig) -> AgentProcess:
    """The agent that was started early, or a new one."""
    schemes = _schemes(config)
    return _waiting.take(schemes) or _start(schemes)


def give_back(process: AgentProcess, config: SpotConfig) -> None:
    """Have an agent that answered wait for the next one to ask."""
    _waiting.put(process, _schemes(config))


class EarlyAgent:
    """An agent that looks at the remote while the trainer still finds out what to ask: a base is being read.

    Ends with its block unless a session has taken it.
    """

    def __init__(self, config: SpotConfig) -> None:
        self._process: AgentProcess | None = start(config)
        ask(self._process, "look", place(config))

    def take(self) -> AgentProcess | None:
        """The process, which is the caller's from here on; None if it was taken."""
        process, self._process = self._process, None
        return process

    def __enter__(self) -> EarlyAgent:
        return self

    def __exit__(self, *_: object) -> None:
        process = self.take()
        if process is not None:
            end(process)


def place(config: SpotConfig) -> dict[str, Any]:
    """What tells an agent where a run is."""
    return {
        "local": str(config.run_folder),
        "remote": config.remote,
        "storage_options": dict(config.storage_options),
        "run": config.run,
        "signing_keys": list(config.signing_keys),
    }


def ask(process: AgentProcess, what: str, request: Mapping[str, Any]) -> None:
    """Ask an agent to `prepare`, `look`, `peek` or `open`; or to `claim` what it has opened.

    It gets the environment as it is now: it may have been started before that was complete.
    """
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died; waiting for its event tells why
        process.stdin.write(json.dumps({"ask": what, "environment": _environment(), **request}) + "\n")
        process.stdin.flush()


def release(process: AgentProcess) -> None:
    """Close the pipes. An agent that has no life ends by that."""
    pipes: tuple[IO[str] | None, ...] = (process.stdin, process.stdout)
    for pipe in pipes:
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # closed all the same; what a dead agent was told is lost
                pipe.close()


def end(process: AgentProcess) -> None:
    """End an agent that has no life: it has done nothing."""
    process.kill()
    release(process)
    process.wait()


def _schemes(config: SpotConfig) -> frozenset[str]:
    """Of the URLs whose file systems have to be loaded."""
    found = {url.partition("://")[0] for url in (config.remote, config.fleet) if url and "://" in url}
    return frozenset(found - {"file", "local"})


def _start(schemes: frozenset[str]) -> AgentProcess:
    # Its own session: a signal to the trainer's process group must not end the drain.
    return subprocess.Popen(
        [sys.executable, "-m", "spot_core.agent", *sorted(schemes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=_environment(),
    )


def _environment() -> dict[str, str]:
    """The trainer's environment, with the folder this package was imported from on the agent's path.

    Without the secrets that the requests hold: the agent may outlive the trainer by hours.
    """
    here = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH")
    plain = {name: value for name, value in os.environ.items() if name not in {SIGNING_KEY, STORAGE_OPTIONS}}
    return {**plain, "PYTHONPATH": here + (os.pathsep + inherited if inherited else "")}
