"""Drives a trainer process and watches its agent, which outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

_TIMEOUT_S = 60.0
FACTS = {"batch": 4, "shapes": "abc"}


class Refused(Exception):
    """The trainer's command raised an error of this project. kind: its class."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class TrainerProcess:
    """One life: `tests.agent.trainer` in a process group of its own."""

    def __init__(self, **environment: str) -> None:
        self.agent = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.agent.trainer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env={**os.environ, **environment},
            start_new_session=True,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def do(self, verb: str, *arguments: Any) -> Any:
        """Have it done and return the result. Raises Refused."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([verb, *arguments]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the trainer died of {verb}: exit code {self._process.wait()}"
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"], answer["message"])
        return answer["result"]

    def open(self, facts: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        opened: dict[str, Any] = self.do("open", options, FACTS if facts is None else facts)
        self.agent = opened["agent"]
        return opened

    def restart_agent(self) -> None:
        self.agent = self.do("restart")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def signal_group(self, signum: signal.Signals) -> None:
        """What a terminal or a process manager does: everyone in the group gets it."""
        os.killpg(self.pid, signum)

    def wait(self) -> int:
        return self._process.wait(_TIMEOUT_S)

    def close(self) -> None:
        """End everything that still runs."""
        for pid in (self.pid, self.agent):
            if pid and is_running(pid):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def eventually(condition: Callable[[], object], what: str, timeout_s: float = _TIMEOUT_S) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s in vain until {what}"
        time.sleep(0.02)


def wait_for_end(trainer: TrainerProcess) -> None:
    eventually(lambda: not is_running(trainer.agent), "the agent ends by itself")
