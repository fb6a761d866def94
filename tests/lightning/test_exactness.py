"""The matrix of the promise: killed at a nasty place, run again, bit-equal to a run that was never killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.lightning.job import JobSpec
from tests.lives.lives import assert_same_training, live_to_the_end, uninterrupted

EVERY_FEW = {"limit_val_batches": 1.0, "val_check_interval": 3}
PER_EPOCH = {"limit_val_batches": 1.0}
ACCUMULATED = {"accumulate_grad_batches": 3}
CLIPPED = {"gradient_clip_val": 0.05}
STOPPING = {"monitor": "val_loss", "patience": 3, "min_delta": 0.05}
BEST = {"monitor": "val_loss", "save_top_k": 1}
WORKERS = {"workers": 2}

# 37 samples in batches of 4: 10 steps an epoch, 4 with accumulation. By hand the judge steps at each batch and the
# forger at every second one: 15 steps an epoch, and batches end at 1, 3, 4, 6, ….
CELLS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "plain": ({}, ["step:3", "step:14"]),
    "last step of an epoch, then its end": ({}, ["step:10", "epoch:2"]),
    "the end of every epoch": ({}, ["epoch:1", "epoch:2", "epoch:3"]),
    "in the middle of a step": ({}, ["backward:4", "backward:10", "backward:17"]),
    "twice within one checkpoint": ({}, ["step:5", "step:5", "step:5"]),
    "during commits": ({}, ["operation:90", "operation:110", "operation:100"]),
    "accumulation": ({"trainer": ACCUMULATED}, ["step:3", "step:5", "epoch:2"]),
    "accumulation, in the middle of a step": ({"trainer": ACCUMULATED}, ["backward:2", "backward:4", "backward:9"]),
    "clipped gradients, accumulation": ({"trainer": {**ACCUMULATED, **CLIPPED}}, ["step:3", "backward:6"]),
    "evaluation": ({"trainer": EVERY_FEW}, ["evaluation:3", "evaluation:9", "step:12"]),
    "evaluation at epoch end": ({"trainer": PER_EPOCH}, ["evaluation:10", "step:12", "evaluation:20"]),
    "evaluation, accumulation": ({"trainer": {**EVERY_FEW, **ACCUMULATED}}, ["evaluation:2", "step:7"]),
    "workers": (WORKERS, ["step:4", "step:10", "step:25"]),
    "persistent workers": ({**WORKERS, "persistent": True}, ["step:4", "epoch:2"]),
    "workers, accumulation, evaluation": (
        {**WORKERS, "trainer": {**ACCUMULATED, **EVERY_FEW}},
        ["evaluation:3", "step:7"],
    ),
    "LoRA": ({"kind": "lora"}, ["step:4", "step:15"]),
    "LoRA, workers, evaluation": ({"kind": "lora", **WORKERS, "trainer": EVERY_FEW}, ["evaluation:6", "step:21"]),
    "manual optimization": ({"kind": "manual"}, ["step:4", "step:9", "step:21"]),
    "manual optimization, at epoch ends": ({"kind": "manual"}, ["step:15", "epoch:2"]),
    "plateau of the epoch's mean loss": ({"kind": "plateau"}, ["step:4", "step:10", "step:17", "epoch:2"]),
    "plateau of the validation loss": (
        {"kind": "plateau_val", "trainer": PER_EPOCH},
        ["evaluation:10", "step:14", "epoch:2"],
    ),
    "two schedulers": ({"kind": "two_schedulers"}, ["step:5", "step:10", "step:19"]),
    "two schedulers, accumulation": ({"kind": "two_schedulers", "trainer": ACCUMULATED}, ["step:3", "epoch:2"]),
    "teacher that follows without gradients": ({"kind": "momentum"}, ["step:4", "step:10", "step:22"]),
    "random augmentation": ({"data": "augmented"}, ["step:4", "step:10", "step:19"]),
    "random augmentation, accumulation, evaluation": (
        {"data": "augmented", "trainer": {**ACCUMULATED, **EVERY_FEW}},
        ["step:2", "evaluation:6", "epoch:2"],
    ),
    "StatefulDataLoader": ({"data": "stateful"}, ["step:4", "step:10", "step:25"]),
    "StatefulDataLoader, workers": ({"data": "stateful", **WORKERS}, ["step:4", "epoch:2"]),
    "StatefulDataLoader, accumulation, evaluation": (
        {"data": "stateful", "trainer": {**ACCUMULATED, **EVERY_FEW}},
        ["step:2", "evaluation:6"],
    ),
    "stream that keeps its own position": ({"data": "stateful_stream"}, ["step:4", "step:10", "epoch:2", "step:21"]),
    "stream that keeps its own position, accumulation, evaluation": (
        {"data": "stateful_stream", "trainer": {**ACCUMULATED, **EVERY_FEW}},
        ["step:2", "evaluation:6"],
    ),
    "stream": ({"data": "stream"}, ["step:4", "step:18"]),
    "two loaders of different lengths": ({"data": "combined"}, ["step:3", "step:6", "step:10", "step:25"]),
    "two loaders, workers": ({"data": "combined", **WORKERS}, ["step:6", "epoch:2"]),
    "batch sampler without a sampler": ({"data": "batch_sampler"}, ["step:4", "step:10", "step:25"]),
    "distributed sampler": ({"data": "distributed_sampler"}, ["step:4", "step:10", "step:25"]),
    "data module with a state": ({"data": "datamodule"}, ["step:4", "step:10", "step:25"]),
    "data module with a state, workers, evaluation": (
        {"data": "datamodule", **WORKERS, "trainer": EVERY_FEW},
        ["evaluation:3", "step:12"],
    ),
    "early stopping next to the user's own checkpoints": (
        {"early_stopping": STOPPING, "checkpoint": BEST, "trainer": {**EVERY_FEW, "max_epochs": 9}},
        ["evaluation:6", "step:8"],
    ),
}

# The cells that meet the Trainer's own loops most.
ELSEWHERE = [
    "plain",
    "last step of an epoch, then its end",
    "accumulation",
    "evaluation",
    "evaluation at epoch end",
    "workers, accumulation, evaluation",
    "manual optimization",
    "plateau of the epoch's mean loss",
    "plateau of the validation loss",
    "StatefulDataLoader, workers",
    "two loaders of different lengths",
]


def assert_killed_and_relaunched_ends_bit_equal(cell: str, folder: Path, **where: str) -> None:
    changes, dies = CELLS[cell]
    spec = JobSpec(folder=str(folder / "job"), **changes, **where)
    reference = uninterrupted(spec, folder / "reference")
    results = live_to_the_end(spec, dies)
    assert [result.exit_code for result in results[:-1]] == [-9] * len(dies)
    assert_same_training(spec, reference)
    log = results[-1].log
    assert "resume: step" in log
    assert "WARNING" not in log
    is_exact_promised = "bit-exact" in log and "not bit-exact" not in log and "exact only if" not in log
    assert is_exact_promised == (spec.data not in {"stream", "batch_sampler"})


@pytest.mark.parametrize("cell", CELLS)
def test_killed_and_relaunched_ends_bit_equal(cell: str, tmp_path: Path) -> None:
    assert_killed_and_relaunched_ends_bit_equal(cell, tmp_path)


@pytest.mark.parametrize("cell", ELSEWHERE)
def test_older_lightning_ends_bit_equal(cell: str, tmp_path: Path) -> None:
    assert_killed_and_relaunched_ends_bit_equal(cell, tmp_path, lightning="2.5")


@pytest.mark.parametrize("cell", ["evaluation, accumulation"])
def test_pytorch_lightning_ends_bit_equal(cell: str, tmp_path: Path) -> None:
    assert_killed_and_relaunched_ends_bit_equal(cell, tmp_path, namespace="pytorch_lightning")


@pytest.mark.parametrize(
    "changes",
    [
        {"data": "augmented", "trainer": {**EVERY_FEW, **ACCUMULATED}},
        {"data": "batch_sampler", **WORKERS, "persistent": True},
        {"data": "combined", **WORKERS},
        {"data": "stateful_stream"},
        {"kind": "manual", "data": "stream"},
    ],
    ids=lambda changes: " ".join(str(value) for value in changes.values() if isinstance(value, str)),
)
def test_the_callback_changes_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    """A life that checkpoints at every boundary equals one that never heard of it."""
    spec = JobSpec(folder=str(tmp_path / "job"), **changes)
    (life,) = live_to_the_end(spec)
    assert life.log.count("checkpoint: step") > 5
    assert_same_training(spec, uninterrupted(spec, tmp_path / "reference"))


def test_random_numbers_drawn_in_workers_are_told(tmp_path: Path) -> None:
    """A resume cannot bring them back, and does not claim that it did."""
    for data in ("augmented", "map"):
        results = live_to_the_end(JobSpec(folder=str(tmp_path / data), data=data, workers=2), ["step:5"])
        assert ("not bit-exact: the data draws random numbers in worker" in results[-1].log) == (data == "augmented")


def test_two_uninterrupted_runs_are_equal(tmp_path: Path) -> None:
    """What every other comparison here rests on."""
    spec = JobSpec(folder=str(tmp_path / "job"), kind="plateau", data="augmented", trainer=EVERY_FEW)
    assert_same_training(uninterrupted(spec, tmp_path / "once"), uninterrupted(spec, tmp_path / "again"))
