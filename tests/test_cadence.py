"""The interval's policy: pure functions, so every claim is checked without waiting."""

from __future__ import annotations

import math
import random
import timeit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spot_core.cadence.cadence import FIRST_S, Cadence
from spot_core.cadence.hazard import SHAPES, End, Evidence, Hazard, LifeSpan, hazard_now
from spot_core.cadence.interval import Costs, Decision, Limits, decide

HOUR = 3600.0
DAY = 24 * HOUR

ages = st.floats(0.0, 1e7)
spans = st.lists(st.builds(LifeSpan, st.floats(0.0, 1e6), st.sampled_from(End)), max_size=50)
costs = st.builds(
    Costs,
    stall_s=st.none() | st.floats(0.0, 1e4),
    upload_s=st.none() | st.floats(0.0, 1e5),
    idle_step_s=st.none() | st.floats(0.0, 1e3),
    busy_step_s=st.none() | st.floats(0.0, 1e3),
)
rates = st.floats(1e-6, 1e4)


def rate(unrescued: float) -> Hazard:
    return Hazard(losses=unrescued, low=unrescued, high=unrescued, rescued=0.0, crashes=0.0)


def interval(some: Costs, per_hour: float = 0.25, **more: float) -> float:
    return decide(some, rate(per_hour), Limits(), **more).interval_s


def lived(seed: int, count: int, draw: str = "expovariate(1.0)") -> list[LifeSpan]:
    source = random.Random(seed)
    kind = {"exponential": lambda: source.expovariate(1.0), "weibull": lambda: source.weibullvariate(1.0, 0.5)}[draw]
    return [LifeSpan(kind() * HOUR, End.LOST) for _ in range(count)]


# -- the hazard ------------------------------------------------------------------------------------------------


def test_without_evidence_the_prior_speaks_and_can_be_set() -> None:
    hour_old = [hazard_now(Evidence(), age_s=HOUR, began_s=HOUR, prior_per_hour=prior) for prior in (0.25, 0.75)]
    assert [hazard.losses for hazard in hour_old] == pytest.approx([0.25, 0.75])


def test_many_lives_outweigh_the_prior() -> None:
    """Lives of one hour in the mean, constant hazard: one loss an hour, and the range tells how sure that is."""
    for prior in (0.5, 0.75, 1.5):
        hazard = hazard_now(Evidence.of(lived(1, 400, "exponential")), age_s=HOUR, began_s=HOUR, prior_per_hour=prior)
        assert hazard.losses == pytest.approx(1.0, rel=0.4)
        assert hazard.low < hazard.losses < hazard.high < 2 * hazard.losses


def test_lives_that_end_young_teach_that_the_young_are_in_danger() -> None:
    young, old = (
        [
            hazard_now(Evidence.of(lived(2, 200, kind)), age_s=age, began_s=age).losses
            for kind in ("weibull", "exponential")
        ]
        for age in (180.0, 10 * HOUR)
    )
    assert young[0] > 3 * old[0], "a Weibull of shape 0.5: six times the hazard"
    assert young[1] < 2 * old[1], "an exponential: the same at any age"


@given(spans, ages, ages)
def test_longer_quiet_never_raises_the_hazard(lives: list[LifeSpan], age: float, more: float) -> None:
    evidence = Evidence.of(lives)
    now, later = (hazard_now(evidence, age_s=seconds) for seconds in (age, age + more))
    assert later.losses <= now.losses * (1 + 1e-9) and later.crashes <= now.crashes * (1 + 1e-9)


@given(spans, st.floats(0.0, 1e6))
def test_a_life_that_ended_quietly_is_exposure_only(lives: list[LifeSpan], duration: float) -> None:
    before, after = (Evidence.of(some) for some in (lives, [*lives, LifeSpan(duration, End.QUIET)]))
    assert after.losses == before.losses and after.crashes == before.crashes
    assert hazard_now(after, age_s=0.0).crashes <= hazard_now(before, age_s=0.0).crashes


@given(spans, st.floats(1.0, 1e6))
def test_one_more_loss_raises_the_hazard_above_one_quiet_life(lives: list[LifeSpan], duration: float) -> None:
    lost, quiet = (Evidence.of([*lives, LifeSpan(duration, end)]) for end in (End.LOST, End.QUIET))
    assert lost.losses > quiet.losses * 0.95


def test_a_crash_of_the_process_says_nothing_of_the_instance() -> None:
    evidence = Evidence.of([LifeSpan(60.0, End.CRASHED)] * 3)
    hazard = hazard_now(evidence, age_s=0.0)
    assert evidence.losses == 0.0 and hazard.losses <= hazard_now(Evidence(), age_s=0.0).losses
    assert hazard.crashes > 5.0, "three crashes in three minutes are believed"
    assert hazard_now(Evidence(), age_s=0.0).crashes < 0.02


def test_notices_that_rescued_are_learnt_and_count_only_where_there_is_time_for_a_rescue() -> None:
    rescued = Evidence.of([LifeSpan(HOUR, End.RESCUED)] * 30)
    hazard, without = (hazard_now(rescued, age_s=0.0, can_rescue=can) for can in (True, False))
    assert hazard.rescued > 0.9 and without.rescued == 0.0
    assert hazard.losses == without.losses
    assert hazard.unrescued < 0.2 * without.unrescued


def test_old_evidence_is_forgotten() -> None:
    """A rate that rose tenfold is followed within some twenty losses, and back."""
    calm, wild = [LifeSpan(10 * HOUR, End.LOST)] * 60, [LifeSpan(HOUR, End.LOST)] * 30
    middle_aged = {"age_s": HOUR, "began_s": HOUR}
    assert hazard_now(Evidence.of(calm), **middle_aged).losses < 0.15
    assert hazard_now(Evidence.of([*calm, *wild]), **middle_aged).losses > 0.35
    assert hazard_now(Evidence.of([*wild, *calm]), **middle_aged).losses < 0.15


def test_an_instance_that_was_old_when_the_process_came_is_not_young() -> None:
    """Only the time that the process saw is exposure, at the ages it saw it."""
    late = Evidence.of([LifeSpan(HOUR, End.QUIET, began_s=10 * HOUR)])
    early = Evidence.of([LifeSpan(HOUR, End.QUIET)])
    assert late.exposure_h[0] == early.exposure_h[0] == 1.0
    assert late.exposure_h[-1] < early.exposure_h[-1]


@given(spans)
def test_evidence_has_one_size_and_finite_sums(lives: list[LifeSpan]) -> None:
    evidence = Evidence.of(lives)
    assert len(evidence.exposure_h) == len(evidence.log_g) == len(SHAPES)
    assert all(map(math.isfinite, (*evidence.exposure_h, *evidence.log_g, evidence.losses, evidence.process_h)))
    assert evidence.losses <= 20.0 + 1e-6, "1 / (1 - 0.95)"


# -- the interval ----------------------------------------------------------------------------------------------


def test_interval_is_the_square_root_of_twice_cost_times_mean_time_to_preemption() -> None:
    """One preemption an hour and 1 s of stall: sqrt(2 · 1 · 3600) ≈ 85 s."""
    assert interval(Costs(stall_s=1.0), 1.0) == pytest.approx(math.sqrt(2 * 3600))


def test_slowdown_while_draining_counts_as_cost() -> None:
    plain = Costs(stall_s=0.001, upload_s=20.0, idle_step_s=1.0)
    assert plain.effective_s == pytest.approx(0.001)
    slowed = plain.with_step(1.25, is_busy=True)
    assert slowed.slowdown == pytest.approx(0.2)
    assert slowed.effective_s == pytest.approx(0.001 + 0.2 * 20.0)
    assert interval(slowed) > interval(plain)


@given(costs, rates, st.floats(1.0, 100.0), st.floats(0.0, 1e6))
def test_more_hazard_never_lengthens_the_interval(some: Costs, per_hour: float, more: float, waiting: float) -> None:
    calm, wild = (interval(some, each, upload_pending_s=waiting) for each in (per_hour, per_hour * more))
    assert wild <= calm


@given(costs, spans, ages, st.floats(0.0, 1e7))
def test_longer_quiet_never_shortens_the_interval(some: Costs, lives: list[LifeSpan], age: float, more: float) -> None:
    cadence = Cadence(evidence=Evidence.of(lives), costs=some, last_useful_s=0.0)
    assert cadence.interval_s(age_s=age + more) >= cadence.interval_s(age_s=age) * (1 - 1e-9)


@given(costs, spans, ages, st.floats(0.0, 1e9), st.floats(0.01, 1e3), st.floats(1.0, 1e3), st.floats(0.001, 1.0))
def test_interval_stays_in_bounds_whatever_comes(
    some: Costs, lives: list[LifeSpan], age: float, waiting: float, shortest: float, more: float, overhead: float
) -> None:
    limits = Limits(shortest_s=shortest, longest_s=shortest * more, most_overhead=overhead)
    cadence = Cadence(evidence=Evidence.of(lives), costs=some, limits=limits, last_useful_s=0.0)
    decision = cadence.decision(age_s=age, upload_pending_s=waiting)
    assert shortest <= decision.interval_s <= limits.longest_s
    assert decision.interval_s >= min(limits.longest_s, some.effective_s / overhead)
    assert decision.interval_s >= min(limits.longest_s, (some.upload_s or 0.0) - (some.stall_s or 0.0))


def bound(some: Costs, per_hour: float = 1.0, limits: Limits | None = None, **more: float) -> Decision:
    return decide(some, rate(per_hour), limits or Limits(), **more)


def test_the_bound_that_holds_is_named() -> None:
    assert bound(Costs(stall_s=1.0)).bound == ""
    assert bound(Costs(stall_s=0.001, upload_s=300.0)).bound == "upload"
    assert bound(Costs(stall_s=0.001, idle_step_s=60.0)).bound == "one step"
    assert bound(Costs(stall_s=100.0), 3600.0).bound == "max_overhead"
    assert bound(Costs(stall_s=0.0), 3600.0).bound == "min_interval_s"
    assert bound(Costs(stall_s=100.0), 1e-6).bound == "max_interval_s"
    pinned = bound(Costs(stall_s=1.0), limits=Limits(pinned_s=7.0))
    assert (pinned.bound, pinned.interval_s) == ("interval_s", 7.0)


def test_an_outage_of_any_length_leaves_a_few_local_checkpoints_and_costs_a_crash_half_of_it_at_most() -> None:
    for minutes in (1, 10, 60, 200):
        cadence = Cadence(costs=Costs(stall_s=0.001, upload_s=1.0), last_useful_s=0.0)
        taken, longest_s = 0, 0.0
        for second in range(1, minutes * 60):  # the checkpoint at 0 waits from now on
            longest_s = max(longest_s, (second - (cadence.last_useful_s or 0.0)) / second if taken else 0.0)
            if cadence.is_due(second, age_s=second, upload_pending_s=second):
                cadence.taken(second)
                taken += 1
        assert 2 <= taken <= 4 + math.log2(minutes * 60)
        assert longest_s <= 0.55


def test_a_slow_uplink_lengthens_the_interval_to_what_an_upload_takes() -> None:
    assert interval(Costs(stall_s=0.5, upload_s=300.0)) >= 299.5 > interval(Costs(stall_s=0.5))


# -- when ------------------------------------------------------------------------------------------------------


def test_first_checkpoint_of_a_life_comes_early_and_the_next_after_the_interval() -> None:
    cadence = Cadence()
    assert not cadence.is_due(FIRST_S / 2, age_s=1.0)
    assert cadence.is_due(FIRST_S, age_s=1.0)
    cadence.taken(FIRST_S)
    cadence.costs = Costs(stall_s=1.0, upload_s=1.0)
    after_s = cadence.interval_s(age_s=1.0)
    assert after_s > 10 * FIRST_S
    assert not cadence.is_due(FIRST_S + 0.99 * after_s, age_s=1.0)
    assert cadence.is_due(FIRST_S + after_s, age_s=1.0)


def test_where_checkpoints_are_known_to_be_dear_the_first_one_waits() -> None:
    assert Cadence(costs=Costs(stall_s=0.5)).interval_s(age_s=0.0) == 25.0
    dear = Cadence(costs=Costs(stall_s=30.0))
    assert dear.interval_s(age_s=0.0) == dear.decision(age_s=0.0).interval_s > 100.0


def test_a_hint_of_danger_makes_a_checkpoint_due_once_more_is_at_risk_than_it_costs() -> None:
    cadence = Cadence(costs=Costs(stall_s=1.0), last_useful_s=0.0)
    assert not cadence.is_due(20.0, age_s=20.0)
    cadence.hint()
    assert not cadence.is_due(2.0, age_s=20.0), "two seconds at risk are not worth a stall of one"
    assert cadence.is_due(20.0, age_s=20.0)
    cadence.taken(20.0, age_s=20.0)
    assert not cadence.is_due(40.0, age_s=40.0), "one hint, one checkpoint"


def test_a_known_end_gets_one_checkpoint_that_is_durable_right_before() -> None:
    """A day's cap and a job's time limit: each with what an upload, a stall and the margins take."""
    costs = Costs(stall_s=1.0, upload_s=20.0)
    cadence = Cadence(costs=costs, walls_s=(DAY, 2 * HOUR), limits=Limits(pinned_s=1e6), last_useful_s=0.0)
    taken = []
    for second in range(0, int(DAY) + 600, 2):
        if cadence.is_due(second, age_s=second, step=second):
            cadence.taken(second, age_s=second, step=second)
            taken.append(second)
    assert taken == [2 * HOUR - costs.rescue_s, DAY - costs.rescue_s]
    assert costs.rescue_s == 5 + 1 + 20 + 2


def test_an_interval_pinned_to_steps_counts_steps() -> None:
    cadence = Cadence(limits=Limits(pinned_steps=50))
    taken = []
    for step in range(1, 201):
        if cadence.is_due(step * 0.3, age_s=step * 0.3, step=step):
            cadence.taken(step * 0.3, age_s=step * 0.3, step=step)
            taken.append(step)
    assert taken == [50, 100, 150, 200]


def test_what_the_fleet_saw_counts_besides_the_runs_own() -> None:
    fleet = Evidence.of([LifeSpan(60.0, End.LOST)] * 8)
    alone, together = (
        Cadence(costs=Costs(stall_s=1.0), fleet=each).interval_s(age_s=0.0) for each in (Evidence(), fleet)
    )
    assert together < alone / 2


def test_a_pinned_interval_holds_from_the_start() -> None:
    cadence = Cadence(limits=Limits(pinned_s=100.0))
    assert not cadence.is_due(99.0, age_s=99.0)
    assert cadence.is_due(100.0, age_s=100.0)


def test_a_not_yet_that_is_kept_for_a_while_is_never_wrong_by_more_than_it_may() -> None:
    """A decision is kept while the instance ages by a sixty-fourth: asked at every second, due as if made anew."""
    kept = Cadence(costs=Costs(stall_s=0.5, upload_s=5.0))
    anew = Cadence(costs=Costs(stall_s=0.5, upload_s=5.0))
    taken: dict[str, list[int]] = {"kept": [], "anew": []}
    for second in range(4 * 3600):
        if kept.is_due(second, age_s=second):
            kept.taken(second)
            taken["kept"].append(second)
        since = second - (anew.last_useful_s or 0.0)
        if since >= anew.interval_s(age_s=second):
            anew.taken(second)
            taken["anew"].append(second)
    assert len(taken["kept"]) > 50
    assert len(taken["kept"]) == pytest.approx(len(taken["anew"]), abs=1)


def test_a_decision_costs_next_to_nothing() -> None:
    """Compared with what it is to stay below, 20 µs, in units of this machine: about 500 calls of an empty function."""
    cadence = Cadence(
        evidence=Evidence.of(lived(3, 50, "weibull")), costs=Costs(0.02, 20.0, 1.0, 1.1), last_useful_s=0.0
    )
    steps = iter(range(10**9))

    def step() -> None:
        second = 3600.0 + next(steps) * 0.01
        cadence.is_due(0.0, age_s=second)

    empty_s = min(timeit.repeat(lambda: None, number=5000, repeat=5))
    assert min(timeit.repeat(step, number=5000, repeat=5)) < 500 * empty_s
