"""Runs jobs life after life in real processes and compares them with an uninterrupted run."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from spot_core.errors import ConfigError
from spot_core.store import catalog, layout
from spot_core.store.posix import PosixTier
from tests.lives.job import LifeSpec

_ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class LifeResult:
    exit_code: int
    log: str


@functools.cache
def _zygote(job: str, preloaded: tuple[str, ...], environment: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
    """The process that forks this job's lives: libraries are imported once for each job and environment."""
    changes = dict(environment)
    path = [changes.pop("PYTHONPATH", ""), str(_ROOT)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.lives.zygote", job, *preloaded],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
        env={**os.environ, **changes, "PYTHONPATH": os.pathsep.join(filter(None, path))},
    )
    atexit.register(process.kill)
    return process


class Life:
    """A running life. `pid` may be sent signals; `result` waits for its end."""

    def __init__(self, spec: LifeSpec) -> None:
        Path(spec.folder).mkdir(parents=True, exist_ok=True)
        self._log = Path(spec.folder) / "log.txt"
        self._log.unlink(missing_ok=True)
        zygote = _zygote(type(spec).__module__, spec.preloaded, tuple(sorted(spec.environment.items())))
        assert zygote.stdin is not None
        assert zygote.stdout is not None
        zygote.stdin.write(json.dumps({"spec": dataclasses.asdict(spec), "log": str(self._log)}) + "\n")
        zygote.stdin.flush()
        self._answers = zygote.stdout
        # A test that failed may have left its life's end unread.
        while " " in (answer := self._answers.readline()):
            pass
        self.pid = int(answer)

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def result(self) -> LifeResult:
        pid, code = self._answers.readline().split()
        assert int(pid) == self.pid
        return LifeResult(int(code), self.log)


def live(spec: LifeSpec, *, kill_after_s: float | None = None) -> LifeResult:
    """One life. kill_after_s: SIGKILL from outside that long after its start, unless it has ended."""
    life = Life(spec)
    if kill_after_s is not None:
        timer = threading.Timer(kill_after_s, life.kill)
        timer.start()
        result = life.result()
        timer.cancel()
        return result
    return life.result()


def live_to_the_end(spec: LifeSpec, dies: list[str] = ()) -> list[LifeResult]:  # type: ignore[assignment]
    """One life for each place to die, then one that must finish."""
    results = [live(dataclasses.replace(spec, dies=where)) for where in dies]
    results.append(live(spec))
    assert results[-1].exit_code == 0, results[-1].log[-6000:]
    return results


def uninterrupted(spec: LifeSpec, folder: Path) -> LifeSpec:
    """The same training without the callback, in one life."""
    shutil.rmtree(folder, ignore_errors=True)
    reference = dataclasses.replace(spec, folder=str(folder), has_callback=False, dies=None)
    result = live(reference)
    assert result.exit_code == 0, result.log[-6000:]
    return reference


def final(spec: LifeSpec) -> dict[str, Any]:
    body: dict[str, Any] = torch.load(Path(spec.folder) / "final.pt", weights_only=True)
    return body


def seen(spec: LifeSpec) -> dict[int, list[list[Any]]]:
    """Step -> what each micro-batch of it held, as last executed; earlier executions must have been the same."""
    executions: dict[tuple[int, int], list[list[Any]]] = {}
    for line in (Path(spec.folder) / "seen.jsonl").read_text().splitlines():
        life, step, *row = json.loads(line)
        executions.setdefault((step, life), []).append(row)
    last: dict[int, list[list[Any]]] = {}
    for (step, _), rows in executions.items():
        # A life may have died in the middle of a step; what it did see must be what the step is made of.
        longer, shorter = sorted((last.get(step, []), rows), key=len, reverse=True)
        assert longer[: len(shorter)] == shorter, f"step {step} was fed differently in two lives"
        last[step] = longer
    return last


def assert_same_training(spec: LifeSpec, reference: LifeSpec) -> None:
    """Every tensor, every logged number and every sample of every step equal."""
    for rank in range(spec.ranks):
        _assert_same(*(dataclasses.replace(each, folder=each.folder_of(rank)) for each in (spec, reference)))


def _assert_same(spec: LifeSpec, reference: LifeSpec) -> None:
    ours, theirs = final(spec), final(reference)
    assert ours["tensors"].keys() == theirs["tensors"].keys()
    different = [name for name, tensor in theirs["tensors"].items() if not torch.equal(tensor, ours["tensors"][name])]
    assert not different, f"{len(different)} of {len(theirs['tensors'])} tensors differ: {different[:4]}"
    assert seen(spec) == seen(reference)
    assert ours["log"] == theirs["log"]
    assert ours.get("extra") == theirs.get("extra")
    assert ours["step"] == theirs["step"]


def live_through_random_kills(spec: LifeSpec, *, seed: int, kills: int, longest_s: float) -> None:
    """Kills from outside at any instruction, start-up and restore included; every third one loses the instance.

    kills: at most, each at a random moment of `longest_s` seconds. Then the job must finish.
    """
    local, remote = local_of(spec), remote_of(spec)
    rng = random.Random(seed)
    killed = 0
    for number in range(kills):
        life = live(spec, kill_after_s=rng.uniform(0.3, longest_s))
        if life.exit_code == 0:
            break
        assert life.exit_code == -signal.SIGKILL, life.log[-3000:]
        killed += 1
        if number % 3 == 2 and catalog.names(remote):
            lose_instance(local.root)
    assert killed >= 2
    assert live(spec).exit_code == 0


def lose_instance(run_folder: Path) -> None:
    """The agent and everything that was on the instance's disk are gone."""
    for status in (run_folder / "journal").glob("0*.agent.json"):
        with contextlib.suppress(psutil.NoSuchProcess):
            agent = psutil.Process(json.loads(status.read_text())["pid"])
            if "spot_core.agent" in agent.cmdline():
                agent.kill()
                psutil.wait_procs([agent], timeout=10)
    shutil.rmtree(run_folder)


def remote_of(spec: LifeSpec) -> PosixTier:
    """The run's remote tier."""
    return PosixTier(f"{spec.folder}/remote/job")


def local_of(spec: LifeSpec) -> PosixTier:
    """The run's local tier, for what has not lost its instance."""
    return PosixTier(f"{spec.folder}/local/job")


def begun(spec: LifeSpec, *, steps: int = 30) -> Life:
    """A life whose checkpoint of a step after `steps` is durable."""
    life = Life(spec)
    wait_for(lambda: any(name.step >= steps for name in catalog.names(remote_of(spec))))
    return life


def first_ended(spec: LifeSpec, outcome: str) -> dict[str, Any]:
    """The record of the first life, once its agent has drained all and told that this is how it ended."""
    record: dict[str, Any] = {}

    def has_ended() -> bool:
        record.update(json.loads(remote_of(spec).read(layout.life(1))))
        return bool(record["outcome"] == outcome)

    wait_for(has_ended)
    return record


def left_step(log: str) -> int:
    """The step that a preempted life left durable on the remote."""
    found = re.search(r"preempted: step (\d+) is durable on the remote", log)
    assert found, log[-3000:]
    return int(found[1])


def wait_for(condition: Any, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition did not come true in time"
        time.sleep(0.05)


# Where the agent has nothing to load, and where it has.
PLACES = {"a folder": {}, "a file system to load": {"remote": "memory://bucket/job"}}


def assert_agent_is_early(
    monkeypatch: pytest.MonkeyPatch, adapter: Any, make: Callable[[], Callable[[], None]], *, is_first: bool
) -> None:
    """The agent is there when `adapter`, a module, finds the run's identity, and ends where that fails.

    make: makes the callback, and returns what trains. is_first: whether the agent waits from then on.
    """
    seen: set[int] = set()
    others = _agents_of_this_process()  # earlier tests' may still be draining
    train = make()
    waiting = _agents_of_this_process() - others
    assert len(waiting) == is_first

    def refuse(*_: object) -> None:
        seen.update(_agents_of_this_process() - others)
        raise ConfigError("no such run")

    monkeypatch.setattr(adapter, "run_identity", refuse)
    with pytest.raises(ConfigError, match="no such run"):
        train()
    assert len(seen) == 1 and waiting <= seen and not seen & _agents_of_this_process()


def _agents_of_this_process() -> set[int]:
    """Process ids of the agents that this very process has started and that have not ended."""
    found = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "spot_core.agent" in child.cmdline():
                found.add(child.pid)
    return found
