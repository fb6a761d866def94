"""What several ranks promise, whichever trainer they have. folder: for the uninterrupted run that is compared with."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from spot_core.store import catalog
from tests.lives.announcer import LEAD_S, announcer
from tests.lives.job import LifeSpec
from tests.lives.lives import (
    LifeResult,
    assert_same_training,
    begun,
    left_step,
    live,
    live_to_the_end,
    remote_of,
    uninterrupted,
)


def assert_kills_change_nothing(spec: LifeSpec, dies: list[str], folder: Path) -> LifeResult:
    """A real kill at each place, then the end. Returns the last life."""
    reference = uninterrupted(spec, folder / "reference")
    results = live_to_the_end(spec, dies)
    assert [result.exit_code for result in results[:-1]] == [-9] * len(dies)
    assert_same_training(spec, reference)
    return results[-1]


def assert_all_leave_at_one_step(spec: LifeSpec, told: int | None, folder: Path) -> None:
    """A signal to the rank `told`, or to all if None."""
    reference = uninterrupted(spec, folder / "reference")
    result = live(dataclasses.replace(spec, dies="term:6", dying_rank=told, interval_s=1000.0))
    assert result.exit_code == 75, result.log[-3000:]
    step = left_step(result.log)
    assert 6 <= step <= 9
    last = live(dataclasses.replace(spec, interval_s=1000.0))
    assert f"resume: step {step}" in last.log
    assert_same_training(spec, reference)


def assert_a_notice_is_trained_through(spec: LifeSpec, folder: Path) -> None:
    """Saved twice, the second time right before the end."""
    reference = uninterrupted(spec, folder / "reference")
    with announcer("aws", folder / "told") as told:
        life = begun(told.over(spec), steps=5)
        deadline = told.announce(LEAD_S)
        result = life.result()
        assert time.time() < deadline
    assert result.exit_code == 75, result.log[-3000:]
    assert "once more just before the end" in result.log and "saving once more" in result.log
    assert catalog.names(remote_of(spec))[0].step == left_step(result.log)
    assert live(spec).exit_code == 0
    assert_same_training(spec, reference)
