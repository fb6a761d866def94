"""Several ranks under DDP: the same training, bit for bit, however it was interrupted."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spot_core.agent import lives
from spot_core.store import catalog
from tests.hf.job import JobSpec
from tests.lives.lives import (
    assert_same_training,
    begun,
    final,
    first_ended,
    live,
    live_through_random_kills,
    live_to_the_end,
    remote_of,
    uninterrupted,
)
from tests.lives.ranks import NOT_PERMITTED
from tests.lives.together import (
    assert_a_notice_is_trained_through,
    assert_all_leave_at_one_step,
    assert_kills_change_nothing,
)

EVERY_FEW = {"eval_strategy": "steps", "eval_steps": 3}
BEST = {
    **EVERY_FEW,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,  # the worst loss is "best": that of an early step
}
WORKERS = {"dataloader_num_workers": 2}

# 37 samples in batches of 4 on two ranks: 5 steps an epoch.
CELLS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "plain": ({}, ["step:3", "step:8"]),
    "one rank alone": ({"dying_rank": 1}, ["step:3", "step:8"]),
    "rank 0 alone, at the end of an epoch": ({"dying_rank": 0}, ["step:5", "epoch:2"]),
    "random augmentation": ({"data": "augmented"}, ["step:2", "step:5", "step:9"]),
    "random augmentation, accumulation": (
        {"data": "augmented", "arguments": {"gradient_accumulation_steps": 2}},
        ["step:2", "step:4"],
    ),
    "workers, evaluation": ({"arguments": {**WORKERS, **EVERY_FEW}}, ["evaluation:3", "step:7"]),
    "the best model": ({"arguments": BEST}, ["step:5", "evaluation:9"]),
    "stream": ({"data": "stream", "arguments": {"max_steps": 12}}, ["step:2", "step:4"]),
    "full fine-tune on three ranks": ({"kind": "full", "ranks": 3}, ["step:2", "step:6"]),
}


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return JobSpec(folder=str(tmp_path / "job"), ranks=2)


@pytest.mark.parametrize("cell", CELLS)
def test_killed_and_relaunched_ends_bit_equal(cell: str, spec: JobSpec, tmp_path: Path) -> None:
    changes, dies = CELLS[cell]
    spec = dataclasses.replace(spec, **changes)
    last = assert_kills_change_nothing(spec, dies, tmp_path)
    assert "bit-exact" in last.log and ("not bit-exact" in last.log) == (spec.data == "stream")


def test_killed_at_random_moments_ends_bit_equal(spec: JobSpec, tmp_path: Path) -> None:
    spec = dataclasses.replace(spec, arguments={"num_train_epochs": 12})
    reference = uninterrupted(spec, tmp_path / "reference")
    live_through_random_kills(spec, seed=3, kills=8, longest_s=3.0)
    assert_same_training(spec, reference)


@pytest.mark.parametrize("told", [None, 0, 1], ids=["all ranks", "rank 0", "rank 1"])
def test_a_signal_to_any_rank_has_all_leave_at_one_step(told: int | None, spec: JobSpec, tmp_path: Path) -> None:
    assert_all_leave_at_one_step(spec, told, tmp_path)


def test_a_signal_to_the_whole_group_with_workers(spec: JobSpec, tmp_path: Path) -> None:
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "max_steps": 150}
    spec = dataclasses.replace(spec, arguments=workers)
    life = begun(spec, steps=20)
    os.killpg(life.pid, signal.SIGTERM)
    result = life.result()
    assert result.exit_code == 75, result.log[-3000:]
    assert live(spec).exit_code == 0
    assert_same_training(spec, uninterrupted(spec, tmp_path / "reference"))


def test_a_notice_is_trained_through(spec: JobSpec, tmp_path: Path) -> None:
    spec = dataclasses.replace(spec, interval_s=1.0, arguments={"max_steps": 400})
    assert_a_notice_is_trained_through(spec, tmp_path)


def test_a_run_that_has_ended_trains_nothing_more(spec: JobSpec) -> None:
    live_to_the_end(spec)
    before = final(spec)
    again = live(spec)
    assert again.exit_code == 0, again.log[-3000:]
    assert final(spec)["step"] == before["step"]
    assert len({name.incarnation for name in catalog.names(remote_of(spec))}) == 1


def test_all_ranks_are_told_why_a_run_cannot_be_opened(spec: JobSpec) -> None:
    live_to_the_end(spec)
    other = live(dataclasses.replace(spec, arguments={"per_device_train_batch_size": 2}))
    assert other.exit_code == 1
    assert "ConfigError: rank 0 did not open the run" in other.log
    assert other.log.count("batch size per device") >= 2


def test_another_number_of_ranks_is_refused_and_nothing_is_lost(spec: JobSpec) -> None:
    live(dataclasses.replace(spec, dies="step:8"))
    first_ended(spec, lives.DIED)  # until then it drains and prunes
    stored = catalog.names(remote_of(spec))
    alone = live(dataclasses.replace(spec, ranks=1))
    assert alone.exit_code == 1 and "world size" in alone.log
    assert catalog.names(remote_of(spec)) == stored
    live_to_the_end(spec)


def test_several_machines_are_refused_on_all_of_them(spec: JobSpec) -> None:
    refused = live(dataclasses.replace(spec, is_apart=True))
    if refused.exit_code == NOT_PERMITTED:
        pytest.skip("this user may not mount")
    assert refused.exit_code == 1
    message = "does not work with training on several machines yet: rank 1 does not see the folder of rank 0"
    assert refused.log.count(f"ConfigError: SpotCallback {message}") == 2, refused.log[-3000:]
    assert not Path(spec.folder, "remote").exists()


def test_under_torchrun(spec: JobSpec, tmp_path: Path) -> None:
    reference = uninterrupted(spec, tmp_path / "reference")
    died = torchrun(dataclasses.replace(spec, dies="step:8", dying_rank=1))
    assert died.returncode == 1 and "Signal 9 (SIGKILL) received" in died.stderr, died.stderr[-6000:]
    last = torchrun(spec)
    assert last.returncode == 0, last.stderr[-6000:]
    assert "resume: step" in last.stderr and "as incarnation 2; bit-exact" in last.stderr
    assert_same_training(spec, reference)


def torchrun(spec: JobSpec) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    job = ["-m", "tests.lives.launched", "tests.hf.job", json.dumps(dataclasses.asdict(spec))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *job]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
