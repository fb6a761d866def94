"""How often lives are interrupted, from the lives seen so far and the one being lived.

Pure functions: time is an argument. A Gamma posterior over a constant hazard: the prior speaks until evidence
does, and quiet time of the current life counts as exposure, so ten quiet hours lengthen the interval by themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Interruptions per hour expected before any evidence: one every four hours.
PRIOR_PER_HOUR = 0.25
# Each interruption makes what was seen before it count this much: rates drift.
FORGETTING = 0.95


@dataclass(frozen=True, slots=True)
class LifeSpan:
    """One earlier life: seconds it lasted, and whether it was interrupted (else it is exposure only)."""

    duration_s: float
    is_interrupted: bool


@dataclass(frozen=True, slots=True)
class Hazard:
    """Posterior of the interruption rate. weight: interruptions seen, after forgetting; exposure_s likewise."""

    weight: float
    exposure_s: float

    @classmethod
    def from_lives(cls, spans: Iterable[LifeSpan]) -> Hazard:
        """Evidence of ended lives, oldest first."""
        weight = exposure_s = 0.0
        for span in spans:
            exposure_s += span.duration_s
            if span.is_interrupted:
                weight, exposure_s = FORGETTING * weight + 1.0, FORGETTING * exposure_s
        return cls(weight, exposure_s)

    def per_second(self, age_s: float) -> float:
        """Posterior mean of the hazard while the current life is `age_s` seconds old: (1 + n) / (1/θ0 + exposure)."""
        prior_exposure_s = 3600.0 / PRIOR_PER_HOUR
        return (1.0 + self.weight) / (prior_exposure_s + self.exposure_s + max(0.0, age_s))
