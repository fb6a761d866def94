"""`fit` that is told of its preemption by a provider. What all sources have in common is in tests/hf."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest

from spot_core.store import catalog
from tests.lightning.job import JobSpec
from tests.lives.announcer import LEAD_S, announcer
from tests.lives.lives import (
    Life,
    assert_same_training,
    begun,
    final,
    left_step,
    live,
    remote_of,
    uninterrupted,
    wait_for,
)

EPOCHS = 60


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return JobSpec(str(tmp_path / "job"), interval_s=1.0, trainer={"max_epochs": EPOCHS})


def test_a_notice_is_trained_through_and_costs_no_step(spec: JobSpec, tmp_path: Path) -> None:
    reference = uninterrupted(spec, tmp_path / "reference")
    with announcer("aws", tmp_path) as told:
        life = begun(told.over(spec))
        told.announce(LEAD_S)
        result = life.result()
    assert result.exit_code == 75, result.log[-3000:]
    assert "saving now, and once more just before the end" in result.log
    following = live(spec)
    assert f"resume: step {left_step(result.log)} " in following.log
    assert_same_training(spec, reference)


def test_in_a_notebook_fit_returns_and_the_process_lives_on(spec: JobSpec, tmp_path: Path) -> None:
    reference = uninterrupted(spec, tmp_path / "reference")
    notebook = dataclasses.replace(spec, options={"on_preempt": "return"})
    life = begun(notebook)
    os.kill(life.pid, signal.SIGTERM)
    result = life.result()
    assert result.exit_code == 0, result.log[-3000:]
    assert final(notebook)["step"] == left_step(result.log)
    assert live(notebook).exit_code == 0
    assert_same_training(notebook, reference)


def test_a_signal_to_the_whole_group_with_workers(spec: JobSpec, tmp_path: Path) -> None:
    """Once, then twice in quick succession. It ends the workers, and PyTorch calls that an error wherever it is."""
    spec = dataclasses.replace(spec, workers=4, persistent=True)
    for signals in (1, 2):
        life = begun(spec, steps=signals * 100)
        for _ in range(signals):
            os.killpg(life.pid, signal.SIGTERM)
            time.sleep(0.02)
        result = life.result()
        assert result.exit_code == 75, result.log[-3000:]
        assert catalog.names(remote_of(spec))[0].step == left_step(result.log)
    assert live(spec).exit_code == 0
    assert_same_training(spec, uninterrupted(spec, tmp_path / "reference"))


# -- while training hangs ----------------------------------------------------------------------------------------

EVALUATES = {"limit_val_batches": 1.0, "val_check_interval": 3}


@pytest.mark.parametrize(("dies", "step"), [("hang_reading:16", 16), ("hang_evaluation:18", 19)])
def test_an_end_announced_while_training_hangs_for_longer_saves_the_last_step(
    dies: str, step: int, tmp_path: Path
) -> None:
    """A minute in the middle of a batch or of a validation, ten seconds of grace, and no checkpoint of that step."""
    spec = JobSpec(str(tmp_path / "job"), interval_s=1000.0, data="augmented", trainer=EVALUATES)
    reference = uninterrupted(spec, tmp_path / "reference")
    life = Life(dataclasses.replace(spec, dies=dies, options={"grace_s": LEAD_S}))
    wait_for(lambda: "hanging at" in life.log)
    deadline = time.time() + LEAD_S
    os.kill(life.pid, signal.SIGTERM)
    result = life.result()
    assert time.time() < deadline, "it left before the end"
    assert result.exit_code == 75, result.log[-3000:]
    assert left_step(result.log) == step
    assert catalog.names(remote_of(spec))[0].step == step
    following = live(spec)
    assert following.exit_code == 0, following.log[-3000:]
    assert f"resume: step {step} " in following.log
    if "reading" in dies:
        assert_same_training(spec, reference)
    else:
        assert f"not bit-exact: the validation of step {step} was cut off by a preemption" in following.log
        assert final(spec)["step"] == final(reference)["step"]
