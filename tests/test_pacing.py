"""Pacing: what counts as useful time, what a checkpoint is measured to cost, and what the cadence is made of."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from spot_core import pacing
from spot_core.agent import lives
from spot_core.agent.client import OpenedRun
from spot_core.agent.lives import Life
from spot_core.cadence.cadence import Cadence
from spot_core.cadence.hazard import PRIOR_PER_HOUR, End, Evidence, LifeSpan
from spot_core.cadence.interval import Costs, Limits
from spot_core.cadence.record import CadenceRecord
from spot_core.config import SpotConfig
from spot_core.notice.instance import Instance
from spot_core.pacing import Pacer
from spot_core.report.decided import sentence

HOUR = 3600.0
STARTED_UNIX_S = 1.8e9
INSTANCE = Instance(id="i-1", boot_id="boot", booted=STARTED_UNIX_S - 600.0, provider="aws", is_spot=True)
LOSS = Evidence.of([LifeSpan(HOUR, End.LOST)])


@dataclass
class Clock:
    """Both of the clocks that pacing reads, moved by the test."""

    now: float = 5000.0

    def perf_counter(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pacing, "time", clock)
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    return clock


def life(number: int, outcome: str = lives.DIED, cadence: dict[str, Any] | None = None, **more: Any) -> Life:
    return Life(
        incarnation=number,
        host="node",
        boot_id="boot",
        instance="i-1",
        started=0.0,
        heartbeat=600.0,
        outcome=outcome,
        cadence=cadence,
        **more,
    )


@dataclass
class Training:
    """A pacer with the clock that it reads, driven as a session does."""

    pacer: Pacer
    clock: Clock

    def step(self, seconds: float = 1.0, *, is_busy: bool = False, uploads: tuple[float, ...] = ()) -> None:
        self.pacer.step_started()
        self.clock.now += seconds
        self.pacer.step_completed(is_busy=is_busy, uploads=uploads)

    def snapshot(self, stall_s: float, gate_s: float = 0.0) -> None:
        """Take one; what the optimizer then waits for it is part of the next step."""
        self.clock.now += stall_s
        self.pacer.taken(stall_s)
        self.clock.now += gate_s
        self.pacer.gate_passed(gate_s)

    def is_due(self, **more: Any) -> bool:
        return self.pacer.is_due(**{"upload_pending_s": 0.0, **more})

    @property
    def costs(self) -> Costs:
        return self.pacer.cadence.costs


Train = Callable[..., Training]


@pytest.fixture
def train(clock: Clock) -> Train:
    def begin(
        history: tuple[Life, ...] = (),
        *,
        instance: Instance = INSTANCE,
        fleet: Evidence | None = None,
        state_bytes: int = 0,
        useful_before_s: float = 0.0,
        **options: Any,
    ) -> Training:
        opened = OpenedRun(
            incarnation=9,
            restored=None,
            source=None,
            pin=None,
            lives=list(history),
            max_steps=None,
            instance=instance,
            fleet=fleet or Evidence(),
        )
        pacer = Pacer(
            SpotConfig(remote="/bucket/run", local="/nvme", **options),
            opened,
            started_unix_s=STARTED_UNIX_S,
            began=clock.now,
            useful_before_s=useful_before_s,
            state_bytes=state_bytes,
        )
        return Training(pacer, clock)

    return begin


# -- useful time -------------------------------------------------------------------------------------------------


def test_steps_are_useful_time_on_top_of_that_of_the_lives_before(train: Train) -> None:
    training = train(useful_before_s=100.0)
    for _ in range(3):
        training.step(2.0)
    assert training.pacer.useful_s == 106.0


def test_what_passes_between_two_steps_is_training_too(train: Train, clock: Clock) -> None:
    training = train()
    training.step()
    clock.now += 0.5  # the loader
    training.step()
    assert training.pacer.useful_s == 2.5


def test_an_evaluation_is_not_useful_time_and_no_step(train: Train, clock: Clock) -> None:
    training = train()
    training.step()
    training.step()
    training.pacer.pause()
    clock.now += 500.0
    training.step()
    assert training.pacer.useful_s == 3.0
    assert training.costs.idle_step_s == 1.0


def test_the_stall_of_a_snapshot_is_not_useful_time_nor_part_of_a_step(train: Train) -> None:
    training = train()
    training.step()
    training.step()
    training.snapshot(30.0)
    training.step(is_busy=True)
    assert training.pacer.useful_s == 3.0
    assert training.costs.busy_step_s == 1.0


def test_what_the_optimizer_waits_for_a_snapshot_is_stall_and_not_useful_time(train: Train) -> None:
    """Counted as both, it would make the step look slowed down by the drain, and the checkpoint dearer than it is."""
    training = train()
    training.step()
    training.step()
    training.snapshot(3.0, gate_s=20.0)
    training.step(is_busy=True)
    assert training.costs.stall_s == 23.0
    assert training.pacer.useful_s == 3.0
    assert training.costs.slowdown == 0.0


def test_a_gate_without_a_snapshot_measures_nothing(train: Train) -> None:
    training = train()
    training.pacer.gate_passed(0.0)
    assert training.costs.stall_s is None
    training.snapshot(2.0)
    training.pacer.gate_passed(0.0)
    assert training.costs.stall_s == 2.0


def test_only_useful_time_makes_a_checkpoint_due(train: Train, clock: Clock) -> None:
    training = train(interval_s=10.0)
    for _ in range(9):
        training.step()
    training.pacer.pause()
    clock.now += 10_000.0
    assert not training.is_due()
    training.step()
    assert training.is_due()
    training.snapshot(0.5)
    assert not training.is_due()


def test_a_checkpoint_pinned_to_steps_is_due_after_so_many(train: Train) -> None:
    training = train(interval_steps=3)
    due = []
    for _ in range(6):
        training.step()
        due.append(training.is_due())
        if due[-1]:
            training.snapshot(0.1)
    assert due == [False, False, True] * 2


# -- measured costs ----------------------------------------------------------------------------------------------


def test_a_lifes_first_step_is_useful_but_no_measure_of_a_step(train: Train) -> None:
    """It compiles, allocates and fills the loader."""
    training = train()
    training.step(60.0)
    assert training.costs.idle_step_s is None
    training.step(1.0)
    assert training.costs.idle_step_s == 1.0
    assert training.pacer.useful_s == 61.0


def test_steps_beside_a_drain_are_measured_apart(train: Train) -> None:
    training = train()
    training.step(9.0)
    training.step(1.0)
    training.step(2.0, is_busy=True, uploads=(40.0,))
    assert (training.costs.idle_step_s, training.costs.busy_step_s, training.costs.upload_s) == (1.0, 2.0, 40.0)


def measured(stall_s: float | None, **more: Any) -> dict[str, Any]:
    return CadenceRecord(Cadence(costs=Costs(stall_s=stall_s, **more)), 10.0, 1.0, 0.0).to_json()


def test_what_the_newest_life_that_measured_it_paid_is_expected_again(train: Train) -> None:
    history = (
        life(1, cadence=measured(9.0, upload_s=90.0)),
        life(2, cadence=measured(2.0, upload_s=20.0, idle_step_s=5.0, busy_step_s=6.0)),
        life(3, cadence=measured(None, upload_s=7.0)),
        life(4),
    )
    costs = train(history, state_bytes=10**12).costs
    assert costs == Costs(stall_s=2.0, upload_s=20.0), "the pace of steps is another instance's"


@pytest.mark.parametrize(
    "unreadable",
    [
        {},
        {"age_s": "x"},
        {**measured(5.0), "costs": None},
        {**measured(5.0), "lead_s": math.nan},
        measured(5.0, upload_s=-1.0),
    ],
    ids=["empty", "other", "no costs", "not a number", "negative"],
)
def test_a_record_that_cannot_be_read_is_passed_over_for_an_older_one(train: Train, unreadable: dict[str, Any]) -> None:
    assert train((life(1, cadence=measured(2.0)), life(2, cadence=unreadable))).costs.stall_s == 2.0


def test_the_stall_is_guessed_from_the_bytes_until_it_is_measured(train: Train) -> None:
    training = train(state_bytes=8 * 10**9)
    assert (training.costs.stall_s, training.costs.expected_stall_s) == (None, 4.0)
    training.step()
    training.snapshot(0.5)
    assert training.costs.expected_stall_s == 0.5


# -- what the cadence is made of ---------------------------------------------------------------------------------


def test_the_lives_before_and_the_fleet_are_evidence(train: Train) -> None:
    history = (life(1, lived_s=HOUR), replace(life(2, lives.RUNNING, lived_s=HOUR), boot_id="another"))
    cadence = train(history, fleet=LOSS).pacer.cadence
    assert cadence.evidence == Evidence.of([LifeSpan(HOUR, End.CRASHED), LifeSpan(HOUR, End.LOST)])
    assert cadence.fleet == LOSS


def test_the_instances_age_counts_from_its_boot(train: Train, clock: Clock) -> None:
    training = train()
    clock.now += 50.0
    assert training.pacer.cadence.began_s == 600.0
    assert training.pacer.record().age_s == 650.0


def test_an_instance_that_claims_to_boot_tomorrow_is_new(train: Train) -> None:
    assert train(instance=replace(INSTANCE, booted=STARTED_UNIX_S + 86_400.0)).pacer.cadence.began_s == 0.0


def test_the_bounds_of_the_configuration_reach_the_cadence(train: Train) -> None:
    assert train().pacer.cadence.limits == Limits()
    free = train(min_interval_s=5.0, max_interval_s=50.0, max_overhead=0.02, grace_s=110.0).pacer.cadence
    assert free.limits == Limits(shortest_s=5.0, longest_s=50.0, most_overhead=0.02)
    assert free.lead_s == 110.0
    assert train(interval_s=7.0).pacer.cadence.limits == Limits(pinned_s=7.0)
    assert train(interval_steps=7).pacer.cadence.limits == Limits(pinned_steps=7)


def test_no_end_is_known_unless_somebody_tells(train: Train) -> None:
    assert train().pacer.cadence.walls_s == ()


def test_a_process_that_will_be_ended_knows_when(train: Train) -> None:
    assert train(max_runtime_s=1800.0).pacer.cadence.walls_s == (2400.0,)


def test_the_end_of_a_slurm_job_is_known(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    ends_unix_s = int(time.time()) + 7200
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(ends_unix_s))
    (wall_s,) = train(instance=replace(INSTANCE, booted=STARTED_UNIX_S)).pacer.cadence.walls_s
    assert wall_s == ends_unix_s - STARTED_UNIX_S


@pytest.mark.parametrize(
    ("provider", "is_spot", "walls_s"),
    [("gcp", True, (24 * HOUR,)), ("gcp", False, ()), ("gcp", None, ()), ("aws", True, ())],
)
def test_a_preemptible_instance_of_google_ends_after_a_day(
    train: Train, provider: str, is_spot: bool | None, walls_s: tuple[float, ...]
) -> None:
    instance = replace(INSTANCE, provider=provider, is_spot=is_spot)
    assert train(instance=instance).pacer.cadence.walls_s == walls_s


def test_a_known_end_makes_one_checkpoint_due_right_before(train: Train, clock: Clock) -> None:
    training = train((life(1, cadence=measured(1.0, upload_s=12.0)),), max_runtime_s=1800.0)
    training.step()
    training.snapshot(1.0)
    born = clock.now - training.pacer.record().age_s
    rescue_s = training.costs.rescue_s
    clock.now = born + 2400.0 - rescue_s - 5.0
    assert not training.is_due()
    clock.now += 6.0
    assert training.is_due()
    training.snapshot(0.5)
    assert not training.is_due()


def test_instances_that_nobody_takes_away_are_expected_to_live_longer(train: Train) -> None:
    spot, unknown, kept = (
        train(instance=replace(INSTANCE, is_spot=is_spot)).pacer.cadence.prior_per_hour
        for is_spot in (True, None, False)
    )
    assert spot == unknown == PRIOR_PER_HOUR
    assert kept < PRIOR_PER_HOUR / 10
    given = train(instance=replace(INSTANCE, is_spot=False), prior_per_hour=3.0).pacer.cadence.prior_per_hour
    assert given == 3.0


# -- a hint of danger --------------------------------------------------------------------------------------------


@pytest.fixture
def at_risk(train: Train) -> Training:
    """A cheap checkpoint was taken a minute of training ago, and the next one is far away."""
    training = train(min_interval_s=HOUR)
    training.step()
    training.step()
    training.snapshot(0.5)
    for _ in range(60):
        training.step()
    return training


def test_a_hint_makes_a_checkpoint_due_once(at_risk: Training) -> None:
    assert not at_risk.is_due()
    assert at_risk.is_due(hinted_unix_s=1.8e9)
    at_risk.snapshot(0.5)
    for _ in range(60):
        at_risk.step()
    assert not at_risk.is_due(hinted_unix_s=1.8e9), "what was said once is not said again"
    assert at_risk.is_due(hinted_unix_s=1.8e9 + 60)


def test_a_hint_waits_until_more_is_at_risk_than_a_checkpoint_costs(train: Train) -> None:
    training = train(min_interval_s=HOUR)
    training.step()
    training.snapshot(3.0)
    due = []
    for _ in range(20):
        training.step()
        due.append(training.is_due(hinted_unix_s=1.8e9))
    assert not due[0] and due[-1]
    assert due == sorted(due)


def test_an_agent_that_was_started_again_and_has_not_asked_yet_hints_at_nothing(at_risk: Training) -> None:
    assert at_risk.is_due(hinted_unix_s=1.8e9)
    at_risk.snapshot(0.5)
    for _ in range(60):
        at_risk.step()
    assert not at_risk.is_due(hinted_unix_s=None)
    assert not at_risk.is_due(hinted_unix_s=1.8e9)


# -- the line in the log -----------------------------------------------------------------------------------------


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.INFO, logger="spot_core"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name == pacing.__name__]


def test_the_first_measured_decision_is_told(train: Train, told: Callable[[], list[str]]) -> None:
    training = train(state_bytes=10**9)
    training.step()
    training.is_due()
    assert told() == [], "a guess is not worth a line"
    training.snapshot(0.5)
    training.step()
    training.is_due()
    (line,) = told()
    assert training.pacer.cadence.decided is not None
    assert line == f"cadence: {sentence(training.pacer.cadence.decided)}"
    assert re.search(r"a checkpoint every \S+ of training.* costs 0.5s .*loss of the instance every.*crash every", line)


def test_it_is_told_again_only_when_the_interval_moved_by_more_than_a_quarter(
    train: Train, told: Callable[[], list[str]], clock: Clock
) -> None:
    training = train()
    training.step()
    training.snapshot(0.5)
    training.is_due()
    intervals, lines = [training.pacer.cadence.decided], [1]
    assert len(told()) == 1
    for _ in range(200):
        clock.now += 600.0  # quiet hours lengthen it slowly
        training.is_due()
        intervals.append(training.pacer.cadence.decided)
        lines.append(len(told()))
    seconds = [decided.interval_s for decided in intervals if decided is not None]
    at = [index for index in range(1, len(lines)) if lines[index] > lines[index - 1]]
    assert 2 <= len(at) <= 10
    last = seconds[0]
    for index, interval_s in enumerate(seconds[1:], start=1):
        assert (index in at) == (not last / 1.25 <= interval_s <= last * 1.25)
        last = interval_s if index in at else last


@pytest.mark.parametrize("pinned", [{"interval_s": 2.0}, {"interval_steps": 2}])
def test_a_pinned_interval_is_never_told(train: Train, told: Callable[[], list[str]], pinned: dict[str, Any]) -> None:
    training = train(**pinned)
    for _ in range(10):
        training.step()
        if training.is_due():
            training.snapshot(0.5)
    assert training.costs.stall_s == 0.5 and told() == []


# -- the record --------------------------------------------------------------------------------------------------


def test_a_record_says_where_the_cadence_stands(train: Train) -> None:
    training = train()
    training.step(10.0)
    training.is_due(upload_pending_s=42.0)
    assert (training.pacer.record().since_s, training.pacer.record().upload_pending_s) == (10.0, 42.0)
    training.snapshot(1.0)
    training.step(4.0)
    record = training.pacer.record()
    assert (record.since_s, record.age_s) == (4.0, 615.0)


def test_what_was_recorded_is_what_was_decided(train: Train) -> None:
    """Although training goes on meanwhile."""
    training = train((life(1, lived_s=HOUR),), fleet=LOSS, max_runtime_s=1800.0, prior_per_hour=0.3, max_overhead=0.05)
    training.step()
    training.step()
    training.snapshot(0.5)
    training.is_due()
    decided, record = training.pacer.cadence.decided, training.pacer.record()
    for _ in range(5):
        training.step(100.0, is_busy=True, uploads=(9.0,))
    assert CadenceRecord.from_json(json.loads(json.dumps(record.to_json()))).decision() == decided


def test_without_bounds_there_is_a_record_too(train: Train) -> None:
    """JSON knows no infinity, and who reads a record refuses it."""
    training = train(max_interval_s=math.inf, max_runtime_s=math.inf, grace_s=math.inf)
    training.step()
    body = json.loads(json.dumps(training.pacer.record().to_json(), allow_nan=False))
    assert CadenceRecord.from_json(body).decision().interval_s == training.pacer.record().decision().interval_s
