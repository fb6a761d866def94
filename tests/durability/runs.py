"""A run whose lives are killed: its processes, its tiers, and what must hold between and after its lives."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from spot_core.store import catalog
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.store.remote import FsspecTier
from spot_core.store.tier import Tier, open_tier
from spot_core.testing.invariants import assert_run_invariants
from tests.durability.job import JobSpec
from tests.lives.lives import Life, LifeResult, assert_same_training, live, lose_instance, wait_for

_PATIENCE_S = 120.0
_OWNER = "TEST_RUN"


class Run:
    """A run and its two tiers. storage: options of the remote. durable: the newest that was seen to be durable."""

    def __init__(self, spec: JobSpec, storage: Mapping[str, Any] | None = None) -> None:
        self.spec = dataclasses.replace(spec, variables={**spec.variables, _OWNER: spec.folder})
        self.storage = dict(storage or {})
        options = self.spec.spot_options
        url = options["remote"]
        self.local = PosixTier(Path(options["local"]) / url.rpartition("/")[2])
        self.remote: Tier = FsspecTier(url, self.storage) if storage else open_tier(url)
        self.durable: CheckpointName | None = None

    def agents(self) -> list[psutil.Process]:
        """This run's agents that are alive, of whichever life: they inherit its environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_agent = process.status() != psutil.STATUS_ZOMBIE and "spot_core.agent" in process.cmdline()
                if is_agent and process.environ().get(_OWNER) == self.spec.folder:
                    found.append(process)
        return found

    def settle(self) -> None:
        """Wait until the agents of ended lives have ended, then judge what lies on the tiers."""
        wait_for(lambda: not self.agents(), timeout_s=_PATIENCE_S)
        assert_run_invariants(self.local, self.remote, durable=self.durable)
        self.durable = max(catalog.names(self.remote), default=self.durable)

    def lose_instance(self) -> None:
        """Processes, local tier and the trainer's own output are gone."""
        for agent in self.agents():
            agent.kill()
            agent.wait()
        if self.local.root.exists():
            lose_instance(self.local.root)
        shutil.rmtree(f"{self.spec.folder}/out", ignore_errors=True)

    def spot(self, *arguments: str | Path) -> str:
        """What a `spot` command prints, asked from where the remote can be reached."""
        command = [sys.executable, "-m", "spot_core.report.cli", *map(str, arguments)]
        variables = {**os.environ, "SPOT_STORAGE_OPTIONS": json.dumps(self.storage)}
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=variables).stdout

    def finish(self, reference: JobSpec) -> LifeResult:
        """One more life, undisturbed."""
        result = live(self.spec)
        self.assert_finished(result, reference)
        return result

    def assert_finished(self, result: LifeResult, reference: JobSpec) -> None:
        """It ended as an uninterrupted run, and its end is durable."""
        assert result.exit_code == 0, result.log[-6000:]
        assert_same_training(self.spec, reference)
        self.settle()
        newest = catalog.names(self.remote)[0]
        assert catalog.completions(self.remote).get(newest) == newest.step, result.log[-3000:]


def kill_life(run: Run, life: Life, kind: str, draw: random.Random) -> bool:
    """SIGKILL the trainer (`trainer`), or it and its agent in either order (`both`); whether all of that landed."""
    agents = run.agents() if kind == "both" else []
    targets = [life.pid, *(agent.pid for agent in agents)]
    draw.shuffle(targets)
    for pid in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    is_trainer_killed = life.result().exit_code == -signal.SIGKILL
    psutil.wait_procs(agents, timeout=_PATIENCE_S)
    return is_trainer_killed and (kind != "both" or len(agents) > 0)


def kill_agents(run: Run, life: Life, draw: random.Random, *, most: int, longest_s: float) -> tuple[int, LifeResult]:
    """SIGKILL the agent alone, and what is started in its place, at random moments; how often, and the life's end."""
    kills = 0
    while kills < most and psutil.pid_exists(life.pid):
        time.sleep(draw.uniform(0.02, longest_s))
        for agent in run.agents():
            with contextlib.suppress(psutil.NoSuchProcess):
                agent.kill()
                kills += 1
    return kills, life.result()
