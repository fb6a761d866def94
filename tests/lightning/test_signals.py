"""Signals that announce a preemption: SIGTERM, and under SLURM the requeue signal; and whose handlers are where."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from spot_core.store import catalog
from tests.lightning.job import JobSpec
from tests.lives.lives import LifeResult, assert_same_training, live, live_to_the_end, remote_of, seen, uninterrupted

EVERY_FEW = {"limit_val_batches": 1.0, "val_check_interval": 3}
JOB_ID = "4711"


def assert_stopped_at(step: int, spec: JobSpec, result: LifeResult) -> None:
    assert result.exit_code == 75, result.log[-3000:]
    assert catalog.names(remote_of(spec))[0].step == step, "the step in which the signal came is durable on the remote"


def assert_continues(step: int, spec: JobSpec, reference: JobSpec) -> None:
    (following,) = live_to_the_end(spec)
    assert f"resume: step {step} " in following.log
    assert_same_training(spec, reference)


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    """With checkpoints only when something asks for one."""
    return JobSpec(folder=str(tmp_path / "job"), interval_s=1000.0, trainer=EVERY_FEW)


@pytest.fixture
def in_slurm(spec: JobSpec, tmp_path: Path) -> JobSpec:
    """As a SLURM batch job would run it; `scontrol` writes down how it was called."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.txt\n')
    program.chmod(0o755)
    environ = {
        "SLURM_JOB_ID": JOB_ID,
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
    }
    return dataclasses.replace(spec, environ=environ)


def requeue_calls(tmp_path: Path) -> list[str]:
    record = tmp_path / "scontrol.txt"
    return record.read_text().splitlines() if record.exists() else []


def test_requeue_signal_commits_the_step_requeues_once_and_exits_75(in_slurm: JobSpec, tmp_path: Path) -> None:
    reference = uninterrupted(in_slurm, tmp_path / "reference")
    result = live(dataclasses.replace(in_slurm, dies="usr1:16"))
    assert_stopped_at(17, in_slurm, result)
    assert requeue_calls(tmp_path) == [f"requeue {JOB_ID}"]
    assert not list(tmp_path.rglob("hpc_ckpt*")), "Lightning's own save would be in the middle of a step"
    assert_continues(17, in_slurm, reference)
    assert len(requeue_calls(tmp_path)) == 1


def test_sigterm_under_slurm_is_a_preemption_without_requeue(in_slurm: JobSpec, tmp_path: Path) -> None:
    """SLURM sends it to jobs that are cancelled as well."""
    reference = uninterrupted(in_slurm, tmp_path / "reference")
    result = live(dataclasses.replace(in_slurm, dies="term:16"))
    assert_stopped_at(17, in_slurm, result)
    assert requeue_calls(tmp_path) == []
    assert_continues(17, in_slurm, reference)


@pytest.mark.parametrize("place", ["term_backward:6", "term_evaluation:6", "term_step:10", "term_epoch:1"])
def test_sigterm_anywhere_in_a_step_ends_that_step_and_loses_nothing(place: str, spec: JobSpec, tmp_path: Path) -> None:
    """`backward`: gradients exist. `evaluation`: inside a validation. `step:10`, `epoch:1`: where an epoch ends."""
    reference = uninterrupted(spec, tmp_path / "reference")
    result = live(dataclasses.replace(spec, dies=place))
    step = {"term_backward:6": 7, "term_evaluation:6": 6}.get(place, 10)
    assert_stopped_at(step, spec, result)
    assert_continues(step, spec, reference)


def test_sigterm_in_the_last_step_is_the_end_of_training(spec: JobSpec, tmp_path: Path) -> None:
    """There is nothing left to come back for."""
    reference = uninterrupted(spec, tmp_path / "reference")
    result = live(dataclasses.replace(spec, dies="term:29"))
    assert result.exit_code == 0, result.log[-3000:]
    assert_same_training(spec, reference)
    assert catalog.names(remote_of(spec))[0].step == 30


@pytest.mark.parametrize("place", ["term_setup:0", "term_sanity:0"])
def test_sigterm_before_the_first_batch_exits_75(place: str, spec: JobSpec, tmp_path: Path) -> None:
    """There is at most one step to lose, and no reason to take the end for that of training."""
    reference = uninterrupted(spec, tmp_path / "reference")
    result = live(dataclasses.replace(spec, dies=place))
    assert result.exit_code == 75, result.log[-3000:]
    record = Path(spec.folder, "seen.jsonl")
    assert not record.exists() or len(seen(spec)) <= 1
    live_to_the_end(spec)
    assert_same_training(spec, reference)


def test_own_sigterm_handler_is_called_and_is_back_after_a_preemption(spec: JobSpec) -> None:
    result = live(dataclasses.replace(spec, handles_sigterm=True, dies="term:4"))
    assert_stopped_at(5, spec, result)
    assert Path(spec.folder, "handler.txt").read_text().split("\n") == ["called", "in place", ""]


def test_own_sigterm_handler_is_back_after_training(spec: JobSpec) -> None:
    live_to_the_end(dataclasses.replace(spec, handles_sigterm=True))
    assert Path(spec.folder, "handler.txt").read_text() == "in place\n"


def test_stop_by_default_action_works_again_after_training(spec: JobSpec) -> None:
    """A script that goes on after `fit` is ended by SIGTERM as it would be without the callback."""
    result = live(dataclasses.replace(spec, stop_at=2, dies="term_after:0"))
    assert result.exit_code == -15, result.log[-3000:]


def test_requeue_signal_before_the_first_batch_is_answered_too(in_slurm: JobSpec, tmp_path: Path) -> None:
    reference = uninterrupted(in_slurm, tmp_path / "reference")
    result = live(dataclasses.replace(in_slurm, dies="usr1_sanity:0"))
    assert result.exit_code == 75, result.log[-3000:]
    assert requeue_calls(tmp_path) == [f"requeue {JOB_ID}"]
    assert not list(tmp_path.rglob("hpc_ckpt*"))
    live_to_the_end(in_slurm)
    assert_same_training(in_slurm, reference)
