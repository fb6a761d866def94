"""Replays lives under a policy for the interval: what was kept, what was lost.

The model, in seconds of an instance's life. Each life first restores for R. A checkpoint stalls training for C; it is
durable U later, and meanwhile training runs at (1 - eps) of its speed. A preemption costs the work since the last
durable checkpoint. A share q of the preemptions is announced W before: where a rescue fits (C, U, the time to see the
notice and a margin, as `Costs.rescue_s` counts them), a safe copy is taken at once, training goes on until the last
moment for a second one, and only what follows that is lost. Every policy is rescued alike and none takes checkpoints
faster than they can be uploaded: what differs is the interval alone. Lives that were not preempted lose nothing.

The adaptive policy is `spot_core.cadence` itself, asked after every checkpoint; where its answer changes slowly, it is
asked again once the instance has aged by an eighth.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from goodput_traces import Trace, TraceLife

from spot_core.cadence.cadence import Cadence
from spot_core.cadence.hazard import End, Evidence, LifeSpan
from spot_core.cadence.interval import MARGIN_S, Costs

STEP_S = 1.0
_AGED = 1 / 8
# Candidates for the best fixed interval: 1 s to 12 h, 9 % apart.
_FIXED_S = [1.0 * 1.09**n for n in range(125)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Costs in seconds: stall C, upload U, restart R; share of losses announced q, lead W in seconds; slowdown eps."""

    stall_s: float
    upload_s: float
    restart_s: float
    announced: float
    lead_s: float
    slowdown: float = 0.0

    @property
    def costs(self) -> Costs:
        """What a run measures in this setting."""
        return Costs(self.stall_s, self.upload_s, STEP_S, STEP_S / (1.0 - self.slowdown))

    @property
    def is_rescuable(self) -> bool:
        return self.costs.rescue_s <= self.lead_s


@dataclass(slots=True)
class Outcome:
    """Sums over lives, in seconds."""

    kept_s: float = 0.0
    lost_s: float = 0.0
    lived_s: float = 0.0
    losses: int = 0

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            self.kept_s + other.kept_s,
            self.lost_s + other.lost_s,
            self.lived_s + other.lived_s,
            self.losses + other.losses,
        )

    @property
    def goodput(self) -> float:
        """Training kept per second of instance time."""
        return self.kept_s / self.lived_s if self.lived_s else 0.0

    @property
    def lost_s_per_preemption(self) -> float:
        return self.lost_s / self.losses if self.losses else 0.0


@dataclass(frozen=True, slots=True)
class Ending:
    """How a life ends in a setting, the same for every policy.

    end_s: its last second of training, before which everything is done. is_lost: by a preemption. is_rescued: its
    last checkpoint is taken at end_s and durable in time.
    """

    life: TraceLife
    end_s: float
    is_lost: bool
    is_rescued: bool


def endings(trace: Trace, setting: Setting, *, seed: int = 0) -> list[list[Ending]]:
    """The lives of each series; which losses are announced is drawn from `seed`."""
    draw = random.Random(seed)
    return [[_ending(life, setting, draw) for life in lives] for lives in trace.series]


def _ending(life: TraceLife, setting: Setting, draw: random.Random) -> Ending:
    is_announced = draw.random() < setting.announced
    is_rescued = is_announced and setting.is_rescuable and not life.is_censored
    # Seeing the notice takes no training time; the safe copy at once and the last one cost a stall each.
    spent_s = 2 * setting.stall_s + setting.upload_s + MARGIN_S if is_rescued else 0.0
    return Ending(life, life.lifetime_s - spent_s, not life.is_censored, is_rescued)


def replay_life(ending: Ending, setting: Setting, cadence: Cadence) -> Outcome:
    """One life under the policy."""
    stall_s, upload_s, end_s = setting.stall_s, setting.upload_s, ending.end_s
    at_s, work_s, durable_s = setting.restart_s, 0.0, 0.0
    slowed_s = 0.0
    while at_s < end_s:
        every_s = max(STEP_S, cadence.interval_s(age_s=at_s))
        period_s = every_s + stall_s
        count = min(int(_AGED * at_s / period_s), int((end_s - at_s) / period_s)) if cadence.last_useful_s else 0
        count = max(1, count)
        gained_s = every_s - min(slowed_s, setting.slowdown * every_s)
        after_s = at_s + count * period_s
        if after_s > end_s:
            work_s += min(gained_s, end_s - at_s)
            break
        late = max(0, math.ceil((after_s + upload_s - end_s) / period_s))
        if late < count:
            durable_s = work_s + (count - late) * gained_s
        work_s, at_s = work_s + count * gained_s, after_s
        slowed_s = setting.slowdown * upload_s
        cadence.costs = setting.costs
        cadence.taken(work_s)
    kept_s = durable_s if ending.is_lost and not ending.is_rescued else work_s
    return Outcome(kept_s, work_s - kept_s, ending.life.lifetime_s, int(ending.is_lost))


def adaptive(lives: Iterable[Iterable[Ending]], setting: Setting) -> Outcome:
    """The project's own policy: each series starts without history and learns from life to life."""
    total = Outcome()
    for series in lives:
        evidence, costs = Evidence(), Costs(stall_s=setting.stall_s)
        for ending in series:
            cadence = Cadence(evidence=evidence, costs=costs, lead_s=setting.lead_s)
            total += replay_life(ending, setting, cadence)
            costs = cadence.costs
            evidence = evidence.with_life(LifeSpan(ending.life.lifetime_s, _end(ending)))
    return total


@dataclass(frozen=True, slots=True)
class Point:
    """What the policy believed and chose at one moment of a series: instance seconds, losses per hour, seconds."""

    at_s: float
    hazard: float
    low: float
    high: float
    interval_s: float
    is_lost: bool


def follow(lives: Iterable[TraceLife], setting: Setting, *, every_s: float = 300.0) -> list[Point]:
    """The adaptive policy through one series, looked at every so many seconds."""
    points, before_s, evidence = [], 0.0, Evidence()
    for life in lives:
        cadence = Cadence(evidence=evidence, costs=setting.costs, lead_s=setting.lead_s, last_useful_s=0.0)
        for nth in range(int(life.lifetime_s / every_s) + 1):
            decision = cadence.decision(age_s=nth * every_s)
            hazard = decision.hazard
            is_lost = nth == 0 and before_s > 0.0
            point = Point(
                before_s + nth * every_s, hazard.losses, hazard.low, hazard.high, decision.interval_s, is_lost
            )
            points.append(point)
        before_s += life.lifetime_s
        evidence = evidence.with_life(LifeSpan(life.lifetime_s, End.QUIET if life.is_censored else End.LOST))
    return points


def _end(ending: Ending) -> End:
    if not ending.is_lost:
        return End.QUIET
    return End.RESCUED if ending.is_rescued else End.LOST


class Fixed:
    """What any fixed interval would have kept of some lives."""

    def __init__(self, lives: Iterable[Iterable[Ending]], setting: Setting) -> None:
        flat = [ending for series in lives for ending in series]
        self._setting = setting
        self._train_s = np.array([max(0.0, ending.end_s - setting.restart_s) for ending in flat])
        self._keeps_all = np.array([not ending.is_lost or ending.is_rescued for ending in flat])
        self._lived_s = sum(ending.life.lifetime_s for ending in flat)
        self._losses = sum(ending.is_lost for ending in flat)

    def outcome(self, every_s: float) -> Outcome:
        """Under this interval, but never one shorter than uploads allow."""
        setting = self._setting
        every_s = max(every_s, setting.upload_s - setting.stall_s, STEP_S)
        period_s = every_s + setting.stall_s
        slowed_s = setting.slowdown * min(setting.upload_s, every_s)
        taken = np.floor(self._train_s / period_s)
        last_s = np.minimum(self._train_s - taken * period_s, every_s)
        durable = np.clip(np.floor((self._train_s - setting.upload_s) / period_s), 0.0, None)

        def work_s(count: np.ndarray) -> np.ndarray:
            return count * every_s - np.clip(count - 1.0, 0.0, None) * slowed_s

        done_s = work_s(taken) + np.clip(last_s - np.where(taken > 0, slowed_s, 0.0), 0.0, None)
        kept_s = np.where(self._keeps_all, done_s, work_s(durable))
        return Outcome(float(kept_s.sum()), float((done_s - kept_s).sum()), self._lived_s, self._losses)

    def best(self) -> tuple[float, Outcome]:
        """The interval, of many, that would have kept most, and what it kept."""
        return max(((every_s, self.outcome(every_s)) for every_s in _FIXED_S), key=lambda pair: pair[1].kept_s)


def knows_every_death(lives: Iterable[Iterable[Ending]], setting: Setting) -> Outcome:
    """One checkpoint a life, durable in its last second."""
    total = Outcome()
    for series in lives:
        for ending in series:
            spent_s = setting.stall_s + setting.upload_s if ending.is_lost else 0.0
            kept_s = max(0.0, ending.life.lifetime_s - setting.restart_s - spent_s)
            total += Outcome(kept_s, 0.0, ending.life.lifetime_s, int(ending.is_lost))
    return total
