"""The rehearsal kills for real, counts what was lost, and tells a failure from a kill."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from spot_core.agent.journal import Progress
from spot_core.chaos.plan import Mode, PlannedKill, drawn_ages, planned
from spot_core.chaos.report import ChaosLife, ChaosReport
from spot_core.chaos.runner import rehearse
from spot_core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_a_command_is_killed_the_wanted_times_and_then_left_to_finish(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    starts.write_text("")
    script = (
        "import pathlib, sys, time; p = pathlib.Path(sys.argv[1]); p.write_text(p.read_text() + 'x'); "
        "time.sleep(0 if len(p.read_text()) > 3 else 60)"
    )
    report = rehearse(
        [sys.executable, "-c", script, str(starts)],
        kills=planned(drawn_ages(1.0, random.Random(1)), most=3),
    )
    assert [life.ending for life in report.lives] == ["killed"] * 3 + ["finished"]
    assert [life.exit_code for life in report.lives] == [-9, -9, -9, 0]
    assert starts.read_text() == "xxxx"
    assert report.failed_code is None


def test_a_command_that_fails_by_itself_is_not_run_again() -> None:
    report = rehearse(
        [sys.executable, "-c", "raise SystemExit(3)"],
        kills=planned(drawn_ages(60.0, random.Random(1)), most=3),
    )
    assert report.failed_code == 3
    assert [life.ending for life in report.lives] == ["failed"]


def test_lost_steps_are_those_a_later_life_repeats() -> None:
    lives = (
        ChaosLife(10.0, "killed", -9, Progress(step=53, useful_s=8.0, resumed_step=0)),
        ChaosLife(2.0, "killed", -9, None),
        ChaosLife(10.0, "finished", 0, Progress(step=100, useful_s=16.5, resumed_step=49)),
    )
    report = ChaosReport(lives)
    assert (report.executed_steps, report.total_lost_steps, report.lost_steps(0)) == (104, 4, 4)
    assert report.goodput == pytest.approx(16.5 / 22.0)


def test_wiping_needs_a_folder_to_wipe() -> None:
    with pytest.raises(ConfigError, match="--local"):
        rehearse(["true"], kills=[PlannedKill(kill_at_s=1.0, mode=Mode.INSTANCE)])


def test_a_loop_of_ones_own_survives_the_rehearsal_bit_for_bit(tmp_path: Path) -> None:
    """`examples/raw_pytorch.py` under `spot chaos`, one kill losing the local tier, against a calm run."""
    script = [sys.executable, str(ROOT / "examples/raw_pytorch.py")]
    calm = subprocess.run(
        [*script, "--remote", f"{tmp_path}/calm/raw", "--local", f"{tmp_path}/calm-local"],
        check=True,
        capture_output=True,
        text=True,
    )
    places = ["--remote", f"{tmp_path}/remote/raw", "--local", f"{tmp_path}/local"]
    chaos = [
        sys.executable,
        "-m",
        "spot_core.report.cli",
        "chaos",
        "--kill-every",
        "3.5",
        "--lives",
        "4",
        "--wipe",
        "2",
    ]
    stormy = subprocess.run(
        [*chaos, "--seed", "5", "--json", *places, "--", *script, *places],
        check=True,
        capture_output=True,
        text=True,
        env={"SPOT_INTERVAL_S": "0.05", "PATH": "/usr/bin:/bin"},
    )
    *_, weights, body = stormy.stdout.strip().splitlines()
    assert weights == calm.stdout.strip().splitlines()[-1]
    report = json.loads(body)
    assert report["lives"][-1]["ending"] == "finished"
    assert sum(life["exit_code"] == -9 for life in report["lives"]) >= 1
    assert any(life["resumed_step"] for life in report["lives"])
