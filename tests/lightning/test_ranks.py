"""Several ranks under DDP: the same training, bit for bit, however it was interrupted."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spot_core.store import catalog
from tests.lightning.job import JobSpec
from tests.lives.lives import (
    assert_same_training,
    left_step,
    live,
    live_through_random_kills,
    live_to_the_end,
    remote_of,
    uninterrupted,
)
from tests.lives.together import (
    assert_a_notice_is_trained_through,
    assert_all_leave_at_one_step,
    assert_kills_change_nothing,
)

EVERY_FEW = {"limit_val_batches": 1.0, "val_check_interval": 2}
ACCUMULATED = {"accumulate_grad_batches": 2}
BEST = {"monitor": "val_loss", "save_top_k": 1}

# 37 samples in batches of 4 on two ranks: 5 steps an epoch.
CELLS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "plain": ({}, ["step:3", "step:8"]),
    "one rank alone": ({"dying_rank": 1}, ["step:3", "step:8"]),
    "rank 0 alone, at the end of an epoch": ({"dying_rank": 0}, ["step:5", "epoch:2"]),
    "Lightning 2.5": ({"lightning": "2.5", "checkpoint": BEST, "trainer": EVERY_FEW}, ["step:3", "epoch:2"]),
    "in the middle of a step": ({}, ["backward:4", "backward:10"]),
    "random augmentation": ({"data": "augmented"}, ["step:2", "step:5", "step:9"]),
    "accumulation, random augmentation": ({"data": "augmented", "trainer": ACCUMULATED}, ["step:2", "step:4"]),
    "LoRA, workers, evaluation": ({"kind": "lora", "workers": 2, "trainer": EVERY_FEW}, ["evaluation:4", "step:7"]),
    "persistent workers": ({"workers": 2, "persistent": True}, ["step:4", "epoch:2"]),
    "the best model": ({"trainer": EVERY_FEW, "checkpoint": BEST}, ["step:5", "evaluation:8"]),
    "the best model of a metric that ranks do not share": (
        {"data": "augmented", "trainer": EVERY_FEW, "checkpoint": {**BEST, "mode": "max"}},
        ["evaluation:4", "step:9"],
    ),
    "three ranks": (
        {"ranks": 3, "trainer": {"strategy": "ddp_find_unused_parameters_true"}},
        ["step:2", "step:6"],
    ),
}


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return JobSpec(folder=str(tmp_path / "job"), ranks=2)


@pytest.mark.parametrize("cell", CELLS)
def test_killed_and_relaunched_ends_bit_equal(cell: str, spec: JobSpec, tmp_path: Path) -> None:
    changes, dies = CELLS[cell]
    spec = dataclasses.replace(spec, **changes)
    last = assert_kills_change_nothing(spec, dies, tmp_path)
    assert "bit-exact" in last.log and "not bit-exact" not in last.log


def test_killed_at_random_moments_ends_bit_equal(spec: JobSpec, tmp_path: Path) -> None:
    spec = dataclasses.replace(spec, trainer={"max_epochs": 12})
    reference = uninterrupted(spec, tmp_path / "reference")
    live_through_random_kills(spec, seed=3, kills=8, longest_s=3.0)
    assert_same_training(spec, reference)


@pytest.mark.parametrize("told", [None, 0, 1], ids=["all ranks", "rank 0", "rank 1"])
def test_a_signal_to_any_rank_has_all_leave_at_one_step(told: int | None, spec: JobSpec, tmp_path: Path) -> None:
    assert_all_leave_at_one_step(spec, told, tmp_path)


def test_a_notice_is_trained_through(spec: JobSpec, tmp_path: Path) -> None:
    spec = dataclasses.replace(spec, interval_s=1.0, trainer={"max_epochs": -1, "max_steps": 400})
    assert_a_notice_is_trained_through(spec, tmp_path)


def test_a_run_that_has_ended_trains_nothing_more(spec: JobSpec) -> None:
    live_to_the_end(spec)
    again = live(spec)
    assert again.exit_code == 0, again.log[-3000:]
    assert "already" in again.log
    assert len({name.incarnation for name in catalog.names(remote_of(spec))}) == 1


def test_all_ranks_are_told_why_a_run_cannot_be_opened(spec: JobSpec) -> None:
    live_to_the_end(spec)
    other = live(dataclasses.replace(spec, kind="lora"))
    assert other.exit_code == 1
    assert "ConfigError: rank 0 did not open the run" in other.log


def test_under_lightnings_own_launcher(spec: JobSpec, tmp_path: Path) -> None:
    reference = uninterrupted(spec, tmp_path / "reference")
    left = launched(dataclasses.replace(spec, dies="term:7", dying_rank=1))
    assert left.returncode == 75, left.stderr[-6000:]
    last = launched(spec)
    assert last.returncode == 0, last.stderr[-6000:]
    assert f"resume: step {left_step(left.stderr)}" in last.stderr
    assert_same_training(spec, reference)


def launched(spec: JobSpec) -> subprocess.CompletedProcess[str]:
    """A script that is run once, and that Lightning runs again for the second rank."""
    job = ["-m", "tests.lives.launched", "tests.lightning.job", json.dumps(dataclasses.asdict(spec))]
    return subprocess.run([sys.executable, *job], capture_output=True, text=True, timeout=200)
