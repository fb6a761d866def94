"""The interval's policy: pure functions, so every claim is checked without waiting."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spot_core.cadence.cadence import Cadence
from spot_core.cadence.hazard import Hazard, LifeSpan
from spot_core.cadence.interval import FIRST_S, LONGEST_S, SHORTEST_S, Costs, optimal_interval_s

HOUR = 3600.0
QUIET = Hazard(weight=0.0, exposure_s=0.0)

seconds = st.floats(0.0, 1e7, allow_nan=False)
spans = st.lists(st.builds(LifeSpan, st.floats(0.0, 1e6), st.booleans()), max_size=50)
costs = st.builds(Costs, stall_s=st.floats(0.0, 100.0), upload_s=st.floats(0.0, 1e4))


def test_interval_is_the_square_root_of_twice_cost_times_mean_time_to_preemption() -> None:
    """One preemption an hour seen over a long time, 1 s of stall: sqrt(2 · 1 · 3600) ≈ 85 s."""
    hourly = Hazard.from_lives([LifeSpan(HOUR, True)] * 400)
    mean_s = 1 / hourly.per_second(0.0)
    assert mean_s == pytest.approx(HOUR, rel=0.15)
    assert optimal_interval_s(Costs(stall_s=1.0), hourly, age_s=0.0) == pytest.approx(math.sqrt(2 * mean_s))


def test_without_evidence_the_prior_speaks() -> None:
    assert QUIET.per_second(0.0) == pytest.approx(0.25 / HOUR)


@given(spans, st.floats(0.0, 1e6))
def test_another_preemption_never_lowers_the_hazard_much_above_its_own_rate(lives: list[LifeSpan], age: float) -> None:
    before = Hazard.from_lives(lives)
    after = Hazard.from_lives([*lives, LifeSpan(0.0, True)])
    assert after.weight > before.weight * 0.95
    assert after.exposure_s <= before.exposure_s


@given(spans, seconds, seconds)
def test_longer_quiet_never_shortens_the_interval(lives: list[LifeSpan], age: float, more: float) -> None:
    hazard = Hazard.from_lives(lives)
    now = optimal_interval_s(Costs(stall_s=0.1), hazard, age_s=age)
    assert optimal_interval_s(Costs(stall_s=0.1), hazard, age_s=age + more) >= now


@given(spans, seconds)
def test_lives_that_ended_cleanly_are_exposure_only(lives: list[LifeSpan], duration: float) -> None:
    calmer = Hazard.from_lives([*lives, LifeSpan(duration, False)])
    assert calmer.per_second(0.0) <= Hazard.from_lives(lives).per_second(0.0)


@given(costs, spans, seconds, seconds)
def test_interval_stays_in_bounds_whatever_comes(
    some: Costs, lives: list[LifeSpan], age: float, waiting: float
) -> None:
    interval = optimal_interval_s(some, Hazard.from_lives(lives), age_s=age, upload_pending_s=waiting)
    assert SHORTEST_S <= interval <= LONGEST_S
    assert interval >= min(LONGEST_S, some.effective_s / 0.10), "overhead stays below a tenth"


def test_an_outage_lengthens_the_interval_by_itself() -> None:
    some = Costs(stall_s=0.001, upload_s=1.0)
    calm = optimal_interval_s(some, QUIET, age_s=0.0)
    assert optimal_interval_s(some, QUIET, age_s=0.0, upload_pending_s=600.0) >= 300.0 > calm


def test_an_outage_of_any_length_leaves_a_few_local_checkpoints_and_costs_a_crash_half_of_it_at_most() -> None:
    for minutes in (1, 10, 60, 200):
        cadence = Cadence(QUIET, costs=Costs(stall_s=0.001, upload_s=1.0), last_useful_s=0.0)
        taken, longest_s = 0, 0.0
        for second in range(1, minutes * 60):  # the checkpoint at 0 waits from now on
            longest_s = max(longest_s, (second - (cadence.last_useful_s or 0.0)) / second if taken else 0.0)
            if cadence.is_due(second, age_s=second, upload_pending_s=second):
                cadence.taken(second)
                taken += 1
        assert 2 <= taken <= 2 + math.log2(minutes * 60)
        assert longest_s <= 0.51


def test_a_slow_uplink_lengthens_the_interval_to_what_an_upload_takes() -> None:
    slow = Costs(stall_s=0.5, upload_s=300.0)
    assert (
        optimal_interval_s(slow, QUIET, age_s=0.0) >= 299.5 > optimal_interval_s(Costs(stall_s=0.5), QUIET, age_s=0.0)
    )


def test_slowdown_while_draining_counts_as_cost() -> None:
    plain = Costs(stall_s=0.001, upload_s=20.0, idle_step_s=1.0)
    assert plain.effective_s == pytest.approx(0.001)
    slowed = plain.with_step(1.25, is_busy=True)
    assert slowed.slowdown == pytest.approx(0.2)
    assert slowed.effective_s == pytest.approx(0.001 + 0.2 * 20.0)
    assert optimal_interval_s(slowed, QUIET, age_s=0.0) > optimal_interval_s(plain, QUIET, age_s=0.0)


def test_first_checkpoint_of_a_life_comes_early_and_the_next_after_the_interval() -> None:
    cadence = Cadence(QUIET)
    assert not cadence.is_due(FIRST_S / 2, age_s=1.0)
    assert cadence.is_due(FIRST_S, age_s=1.0)
    cadence.taken(FIRST_S)
    cadence.costs = Costs(stall_s=0.5)
    interval = cadence.interval_s(age_s=10.0)
    assert interval == pytest.approx(math.sqrt(2 * 0.5 / QUIET.per_second(10.0)))
    assert not cadence.is_due(FIRST_S + interval * 0.99, age_s=10.0)
    assert cadence.is_due(FIRST_S + interval, age_s=10.0)


def test_a_fixed_interval_is_kept() -> None:
    cadence = Cadence(QUIET, fixed_interval_s=30.0)
    assert not cadence.is_due(29.9, age_s=1e6)
    assert cadence.is_due(30.0, age_s=0.0)
