"""SIGTERMs at random moments of whole lives: each leaves the very state of an uninterrupted run on the remote.

Whatever a signal falls into (the start, a restore, a step, a commit, an upload, the last step), the process leaves with
a documented code, and what it left is bit for bit what the run without interruptions had after that step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spot_core.store import catalog, layout, resume
from tests.durability.scale import times
from tests.hf.job import JobSpec as HfJob
from tests.lightning.job import JobSpec as LightningJob
from tests.lives.job import LifeSpec, digest_of, states
from tests.lives.lives import Life, assert_same_training, left_step, live, remote_of, uninterrupted, wait_for

STEPS = times(150, 400)
LONGEST_S = 2.0
AT_THE_START = (
    0.2  # share of the signals that come at any moment from the process's start on; the others, once it trains
)
# Before `train()` or `fit` is called, and when it has returned, a signal finds Python's own handling.
_NOT_OURS = -signal.SIGTERM


def stored_by_hf(checkpoint: Path, step: int) -> str:
    folder = checkpoint / f"checkpoint-{step}"
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    return digest_of(load_file(folder / "adapter_model.safetensors").values(), optimizer)


def stored_by_lightning(checkpoint: Path, step: int) -> str:
    body = torch.load(checkpoint / f"step-{step}.ckpt", weights_only=True)
    return digest_of(body["state_dict"].values(), body["optimizer_states"][0])


def _hf(folder: Path) -> LifeSpec:
    return HfJob(str(folder), interval_s=0.2, arguments={"max_steps": STEPS})


def _lightning(folder: Path) -> LifeSpec:
    return LightningJob(str(folder), interval_s=0.2, trainer={"max_epochs": -1, "max_steps": STEPS})


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("job", "stored", "signals"),
    [
        pytest.param(_hf, stored_by_hf, times(4, 200), id="hf"),
        pytest.param(_lightning, stored_by_lightning, times(4, 100), id="lightning"),
    ],
)
def test_a_signal_leaves_the_state_that_an_uninterrupted_run_had_at_that_step(
    job: Callable[[Path], LifeSpec], stored: Callable[[Path, int], str], signals: int, tmp_path: Path
) -> None:
    reference = uninterrupted(dataclasses.replace(job(tmp_path), has_digests=True), tmp_path / "reference")
    expected = states(reference)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw, sent, in_training, runs = random.Random(seed), 0, 0, 0
    while sent < signals:
        spec, reached = job(tmp_path / f"run-{runs}"), 0
        runs += 1
        while sent < signals:
            life = Life(spec)
            if draw.random() > AT_THE_START:
                wait_for(lambda life=life: "incarnation" in life.log)  # type: ignore[misc]
            time.sleep(draw.uniform(0.02, LONGEST_S))
            with contextlib.suppress(ProcessLookupError):  # it is over
                os.kill(life.pid, signal.SIGTERM)
            result = life.result()
            if result.exit_code == 0:
                break  # it was in the last step, or past it
            sent += 1
            assert result.exit_code in {75, _NOT_OURS}, result.log[-3000:]
            if catalog.completions(remote_of(spec)):
                break  # what the job itself does after training was cut off
            if "incarnation" not in result.log or "before the first step" in result.log:
                continue
            assert result.exit_code == 75, result.log[-3000:]
            step = left_step(result.log)
            assert step >= reached, "nothing is lost"
            newest = catalog.names(remote_of(spec))[0]
            assert newest.step == step
            resume.verify(remote_of(spec), catalog.read_manifest(remote_of(spec), newest))
            assert stored(Path(spec.folder, "remote/job", layout.checkpoint(newest)), step) == expected[step]
            reached = step
            in_training += 1
        assert live(spec).exit_code == 0
        assert_same_training(spec, reference)
    print(f"{sent} signals, {in_training} of them while training, in {runs} runs of {STEPS} steps")
