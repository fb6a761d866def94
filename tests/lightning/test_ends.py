"""A run that had ended: it stays ended, however it was recorded, until it is asked for more."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from spot_core.store import catalog
from tests.lightning.job import JobSpec
from tests.lightning.runs import NEVER_BETTER, assert_trains_nothing_more, ends_of, forget_end
from tests.lives.lives import (
    assert_same_training,
    final,
    live_to_the_end,
    remote_of,
    seen,
    uninterrupted,
)

EVERY_FEW = {"limit_val_batches": 1.0, "val_check_interval": 3}
ACCUMULATED = {"accumulate_grad_batches": 3}


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return JobSpec(folder=str(tmp_path / "job"))


def test_finished_run_exits_at_once_and_commits_nothing(spec: JobSpec) -> None:
    live_to_the_end(spec)
    before = {path: path.read_bytes() for path in remote_of(spec).root.rglob("*") if path.is_file()}
    assert_trains_nothing_more(spec)
    assert {path: path.read_bytes() for path in remote_of(spec).root.rglob("*") if path.is_file()} == before


def test_end_that_was_not_recorded_is_recorded_by_the_next_life(spec: JobSpec) -> None:
    live_to_the_end(spec)
    forget_end(spec)
    assert_trains_nothing_more(spec)
    assert [{name.step for name in ends} for ends in ends_of(spec)] == [{30}, {30}]
    before = catalog.names(remote_of(spec))
    assert_trains_nothing_more(spec)
    assert catalog.names(remote_of(spec)) == before


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"stop_at": 15}, 15),
        ({"stop_at": 20}, 20),  # an epoch's last step
        ({"early_stopping": NEVER_BETTER, "trainer": {**EVERY_FEW, "max_epochs": 9}}, 13),
        ({"early_stopping": NEVER_BETTER, "trainer": {"limit_val_batches": 1.0, "max_epochs": 9}}, 40),
    ],
)
def test_run_that_was_stopped_early_stays_stopped(changes: dict[str, Any], step: int, tmp_path: Path) -> None:
    spec = JobSpec(folder=str(tmp_path / "job"), **changes)
    live_to_the_end(spec)
    assert final(spec)["step"] == step
    before = catalog.names(remote_of(spec))
    assert_trains_nothing_more(spec)
    assert catalog.names(remote_of(spec)) == before


@pytest.mark.parametrize(
    ("trainer", "lightning"),
    [(EVERY_FEW, None), (EVERY_FEW, "2.5"), ({**ACCUMULATED, "limit_val_batches": 1.0}, None)],
)
def test_finished_run_with_more_epochs_trains_on_bit_equal(
    trainer: dict[str, Any], lightning: str | None, tmp_path: Path
) -> None:
    """The schedule does not depend on the number of epochs."""
    spec = JobSpec(folder=str(tmp_path / "job"), trainer={**trainer, "max_epochs": 2}, lightning=lightning)
    live_to_the_end(spec)
    end = final(spec)["step"]
    longer = dataclasses.replace(spec, trainer={**trainer, "max_epochs": 4})
    (result,) = live_to_the_end(longer)
    assert f"resume: step {end} from the local tier" in result.log
    assert final(longer)["step"] == 2 * end
    assert_same_training(longer, uninterrupted(longer, tmp_path / "reference"))


@pytest.mark.parametrize(
    "changes",
    [
        {"stop_at": 15},
        {"stop_at": 20},
        {"early_stopping": NEVER_BETTER, "trainer": {**EVERY_FEW, "max_epochs": 9}},
        {"trainer": {"max_steps": 15}},
    ],
)
def test_early_end_that_was_not_recorded_is_still_the_end(changes: dict[str, Any], tmp_path: Path) -> None:
    spec = JobSpec(folder=str(tmp_path / "job"), **changes)
    live_to_the_end(spec)
    ends = ends_of(spec)
    forget_end(spec)
    assert_trains_nothing_more(spec)
    assert ends_of(spec) == ends


@pytest.mark.parametrize(
    "changes",
    [
        {"stop_at": 12, "trainer": {"max_epochs": 9, "min_steps": 25}},
        {"stop_at": 12, "trainer": {"max_epochs": 9, "min_epochs": 3}},
    ],
)
def test_stop_that_waits_for_the_least_number_of_steps_is_not_forgotten(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    spec = JobSpec(folder=str(tmp_path / "job"), **changes)
    reference = uninterrupted(spec, tmp_path / "reference")
    assert 20 < final(reference)["step"] <= 30
    live_to_the_end(spec, ["step:18"])
    assert_same_training(spec, reference)


def test_more_steps_after_an_end_inside_an_epoch_are_not_called_bit_exact(tmp_path: Path) -> None:
    """Training that goes on begins an epoch, where an uninterrupted run would have been in the middle of one."""
    spec = JobSpec(folder=str(tmp_path / "job"), trainer={"max_epochs": -1, "max_steps": 15})
    live_to_the_end(spec)
    longer = dataclasses.replace(spec, trainer={"max_epochs": -1, "max_steps": 35})
    (result,) = live_to_the_end(longer)
    assert final(longer)["step"] == 35
    sizes = [len(rows[0][0]["rows"]) for step, rows in sorted(seen(longer).items()) if step >= 15]
    assert sizes == [*[4] * 9, 1, *[4] * 9, 1], "whole epochs from there on"
    assert "not bit-exact" in result.log
