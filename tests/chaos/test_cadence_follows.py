"""The interval of a real training follows what really happens to it, and says why."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SPOT = [sys.executable, "-m", "spot_core.report.cli"]


class Rehearsed:
    """A run that is rehearsed in phases: each trains it further, through some kills."""

    def __init__(self, folder: Path) -> None:
        self.remote, self.local = str(folder / "bucket" / "steady"), str(folder / "nvme")
        self.told: list[float] = []  # intervals in the log, in seconds

    def phase(self, steps: int, *, kills: int, kill_every_s: float) -> dict[str, Any]:
        """Train to `steps` and return what `spot explain` says then."""
        chaos = ["chaos", "--kill-every", str(kill_every_s), "--lives", str(kills), "--seed", "3"]
        places = ["--remote", self.remote, "--local", self.local]
        log = self._run(*chaos, *places, "--", sys.executable, "tests/chaos/steady.py", str(steps))
        told = re.findall(r"cadence: a checkpoint every ([\d.]+)(ms|s) of training", log)
        self.told += [float(number) / (1000 if unit == "ms" else 1) for number, unit in told]
        found: dict[str, Any] = json.loads(self._run("explain", self.remote, "--json"))
        return found

    def explained(self) -> str:
        return self._run("explain", self.remote)

    def _run(self, *arguments: str) -> str:
        result = subprocess.run(
            [*SPOT, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "PYTHONPATH": str(ROOT), "SPOT_MIN_INTERVAL_S": "0.02", "SPOT_OVERFLOW": ""},
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + (result.stderr if arguments[0] == "chaos" else "")


def test_the_interval_falls_while_a_job_is_killed_often_and_rises_when_that_is_over(tmp_path: Path) -> None:
    run = Rehearsed(tmp_path)
    before = run.phase(600, kills=0, kill_every_s=60.0)
    storm = run.phase(3_600, kills=5, kill_every_s=5.0)
    words = run.explained()
    calm = run.phase(9_600, kills=0, kill_every_s=60.0)

    assert before["lives"] == {"lost": 0, "rescued": 0, "crashed": 0, "quiet": 0}
    assert storm["lives"] == {"lost": 0, "rescued": 0, "crashed": 5, "quiet": 1}
    assert calm["lives"] == {"lost": 0, "rescued": 0, "crashed": 5, "quiet": 2}
    assert storm["crashes_per_hour"] > 100 * before["crashes_per_hour"]
    assert calm["crashes_per_hour"] < 0.7 * storm["crashes_per_hour"]
    assert "5 crashed" in words and re.search(r"crashes expected +one every \d", words)

    assert min(run.told) < max(run.told[:2]) / 4, "the log told of the fall"
    # What a checkpoint costs is measured anew all the time: at the same cost, only what was learnt is left.
    assert storm["interval_s"] < before["interval_s"] / 4
    assert at_one_cost(storm) < at_one_cost(before) / 4 and at_one_cost(calm) > 1.2 * at_one_cost(storm)


def at_one_cost(found: dict[str, Any]) -> float:
    """The best interval if a checkpoint cost one second."""
    return float(found["best_s"] / found["cost_s"] ** 0.5)
