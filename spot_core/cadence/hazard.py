"""How often lives are interrupted, from the lives seen so far and the one being lived.

Pure functions: time is an argument. The hazard at instance age a is h(a) = θ · g_k(a), g_k(a) = (a / 1 h)^(k-1) held
constant below two minutes, with a Gamma posterior over θ: the prior speaks until evidence does. Quiet time of the
current life counts as exposure, so ten quiet hours lengthen the interval by themselves. Whether young instances die
more often (k < 1) is learnt too: the estimates of the four shapes are averaged, weighed by how well each explains
the lives (their marginal likelihoods).

Evidence is a handful of sums, however many lives a run has had. Each loss and each crash makes what was seen before it
count a little less: rates drift.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

# Losses of an instance per hour expected before any evidence, believed as firmly as three of them: what GPU spot
# instances show in public traces (means of 1.5 to 1.8 hours; others live ten times as long, which quiet time teaches).
PRIOR_PER_HOUR = 0.75
_PRIOR_LOSSES = 3.0
# Expected of an instance that is known not to be a spot instance: what hardware and maintenance take.
_ON_DEMAND_PER_HOUR = 0.02
# The shapes k that are averaged: 1 is a constant hazard, less means that the young die more often. Each is believed
# less likely beforehand than the one before it.
SHAPES = (1.0, 0.8, 0.6, 0.45)
_LOG_ODDS = (0.0, -1.0, -2.0, -3.0)
FORGETTING = 0.95
# Crashes of the process alone, before any evidence: a half in so many hours, with the odds of each. Most programs crash
# about never; one that crashes every minute is known as such after the second time, every few seconds after the third.
_CRASH_COUNT = 0.5
_CRASH_HOURS = ((50.0, 1.0), (5.0, 3e-2), (0.5, 1e-3), (0.05, 3e-5), (0.005, 1e-6))
# ln odds + ln of the prior's normalisation, and the prior's hours.
_CRASH_PRIORS = tuple((math.log(odds) + _CRASH_COUNT * math.log(hours), hours) for hours, odds in _CRASH_HOURS)
# The share of losses that a notice rescues, before any evidence: any share is as likely as any other, Beta(1, 1).
_RESCUE_PRIOR = (1.0, 1.0)

_HOUR_S = 3600.0
_YOUNGEST_S = 120.0
_YOUNGEST_H = _YOUNGEST_S / _HOUR_S
# Of each shape, g_k until then and that age to the power of k.
_YOUNG = {k: (float(_YOUNGEST_H ** (k - 1.0)), float(_YOUNGEST_H**k)) for k in SHAPES}
# Beyond these nothing is known that could matter, and squares of rates vanish.
_OLDEST_S = 1e12
_LEAST_PER_HOUR = 1e-9
# Two-sided 90 %.
_Z = 1.6448536


def usual_per_hour(*, is_spot: bool | None) -> float:
    """Losses of an instance an hour to expect before any were seen. is_spot: None if the provider does not tell."""
    return _ON_DEMAND_PER_HOUR if is_spot is False else PRIOR_PER_HOUR


class End(Enum):
    """How a life ended, as far as the hazard is concerned."""

    LOST = "lost"  # the instance went, and no notice saved the work
    RESCUED = "rescued"  # the instance went, and a notice saved the work in time
    CRASHED = "crashed"  # the process went, the instance lived on
    QUIET = "quiet"  # complete, stopped by its user, or still running: exposure only


@dataclass(frozen=True, slots=True)
class LifeSpan:
    """One earlier life: seconds of instance age that it covered, from `began_s` to `began_s + duration_s`, and its end.

    began_s is 0 unless the instance had lived before the process started.
    """

    duration_s: float
    end: End
    began_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that earlier lives teach, after forgetting.

    losses, rescued: instances lost, and how many of them a notice rescued. exposure_h, log_g: for each of SHAPES, the
    summed hours of ∫g_k over the lives and the summed ln g_k at the losses. crashes, process_h: of the process alone.
    """

    losses: float = 0.0
    rescued: float = 0.0
    exposure_h: tuple[float, ...] = (0.0,) * len(SHAPES)
    log_g: tuple[float, ...] = (0.0,) * len(SHAPES)
    crashes: float = 0.0
    process_h: float = 0.0

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(
            self.losses + other.losses,
            self.rescued + other.rescued,
            tuple(a + b for a, b in zip(self.exposure_h, other.exposure_h, strict=True)),
            tuple(a + b for a, b in zip(self.log_g, other.log_g, strict=True)),
            self.crashes + other.crashes,
            self.process_h + other.process_h,
        )

    def scaled(self, factor: float) -> Evidence:
        """The same evidence, counted `factor` times."""
        return Evidence(
            factor * self.losses,
            factor * self.rescued,
            tuple(factor * value for value in self.exposure_h),
            tuple(factor * value for value in self.log_g),
            factor * self.crashes,
            factor * self.process_h,
        )

    def with_life(self, span: LifeSpan) -> Evidence:
        """One more life, later than those before."""
        ended_s = span.began_s + max(0.0, span.duration_s)
        is_lost = span.end in {End.LOST, End.RESCUED}
        seen = Evidence(
            losses=float(is_lost),
            rescued=float(span.end is End.RESCUED),
            exposure_h=tuple(_growth(k, ended_s) - _growth(k, span.began_s) for k in SHAPES),
            log_g=tuple(math.log(_shape(k, ended_s)) if is_lost else 0.0 for k in SHAPES),
            crashes=float(span.end is End.CRASHED),
            process_h=max(0.0, span.duration_s) / _HOUR_S,
        )
        return (self if span.end is End.QUIET else self.scaled(FORGETTING)) + seen

    @classmethod
    def of(cls, spans: Iterable[LifeSpan]) -> Evidence:
        """Evidence of ended lives, oldest first."""
        evidence = cls()
        for span in spans:
            evidence = evidence.with_life(span)
        return evidence


@dataclass(frozen=True, slots=True)
class Hazard:
    """What to expect now. Rates are per hour.

    losses: of instances; low and high: its 90 % credible range. rescued: the share of them that a notice rescues.
    crashes: of the process alone.
    """

    losses: float
    low: float
    high: float
    rescued: float
    crashes: float

    @property
    def unrescued(self) -> float:
        """Interruptions per hour that cost the work since the last checkpoint."""
        return self.losses * (1.0 - self.rescued) + self.crashes

    def times(self, factor: float) -> Hazard:
        """The same picture with every rate multiplied."""
        rates = {name: factor * getattr(self, name) for name in ("losses", "low", "high", "crashes")}
        return replace(self, **rates)


def hazard_now(
    evidence: Evidence,
    *,
    age_s: float,
    began_s: float = 0.0,
    can_rescue: bool = True,
    prior_per_hour: float = PRIOR_PER_HOUR,
) -> Hazard:
    """The posterior while the current life lasts.

    age_s: seconds since the instance started. began_s: its age when this process started. can_rescue: whether a
    notice, if one comes, leaves the time that a rescue takes.
    """
    age_s = min(max(0.0, age_s), _OLDEST_S)
    prior_per_hour = max(prior_per_hour, _LEAST_PER_HOUR)
    began_s = min(max(0.0, began_s), age_s)
    count = _PRIOR_LOSSES + evidence.losses
    thetas: list[float] = []
    logs: list[float] = []
    for k, odds, exposure_h, log_g in zip(SHAPES, _LOG_ODDS, evidence.exposure_h, evidence.log_g, strict=True):
        exposed = _PRIOR_LOSSES / prior_per_hour + exposure_h + _growth(k, age_s) - _growth(k, began_s)
        thetas.append(count / exposed * _shape(k, age_s))
        # ln of the marginal likelihood, up to what all shapes share: ∏g / exposed^(a+n), times prior odds.
        logs.append(odds + log_g - count * math.log(exposed))
    highest = max(logs)
    weights = [math.exp(log - highest) for log in logs]
    total = sum(weights)
    mean = sum(weight * theta for weight, theta in zip(weights, thetas, strict=True)) / total
    # Each shape's posterior is a Gamma of this count: mean θ, variance θ²/count; the mixture's second moment follows.
    second = sum(w * theta * theta for w, theta in zip(weights, thetas, strict=True)) / total * (1.0 + 1.0 / count)
    low, high = _gamma_range(mean, second - mean * mean)
    a, b = _RESCUE_PRIOR
    return Hazard(
        losses=mean,
        low=low,
        high=high,
        rescued=(a + evidence.rescued) / (a + b + evidence.losses) if can_rescue else 0.0,
        crashes=_crash_rate(evidence.crashes, evidence.process_h + (age_s - began_s) / _HOUR_S),
    )


def _crash_rate(crashes: float, hours: float) -> float:
    """Posterior mean per hour, over the priors of _CRASH_HOURS weighed by how well each explains what was seen."""
    count = _CRASH_COUNT + crashes
    logs = [log - count * math.log(prior_h + hours) for log, prior_h in _CRASH_PRIORS]
    highest = max(logs)
    weights = [math.exp(log - highest) for log in logs]
    rates = [weight * count / (prior_h + hours) for weight, (_, prior_h) in zip(weights, _CRASH_PRIORS, strict=True)]
    return sum(rates) / sum(weights)


def _shape(k: float, age_s: float) -> float:
    """g_k(a) = (max(a, 2 min) / 1 h)^(k-1)."""
    return float((max(age_s, _YOUNGEST_S) / _HOUR_S) ** (k - 1.0))


def _growth(k: float, age_s: float) -> float:
    """G_k(a): hours of ∫ g_k from 0 to a."""
    if age_s == 0.0:
        return 0.0
    hours = age_s / _HOUR_S
    per_hour, until_k = _YOUNG[k]
    if hours <= _YOUNGEST_H:
        return hours * per_hour
    return _YOUNGEST_H * per_hour + (float(hours**k) - until_k) / k


def _gamma_range(mean: float, variance: float) -> tuple[float, float]:
    """The 5 % and 95 % points of a Gamma distribution (Wilson and Hilferty 1931)."""
    shape = mean * mean / variance
    spread = 1.0 / (9.0 * shape)
    low, high = (max(0.0, 1.0 - spread + z * math.sqrt(spread)) ** 3 * mean for z in (-_Z, _Z))
    return low, high
