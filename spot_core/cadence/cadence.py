"""Cadence: decides at a step boundary whether a checkpoint is due. Holds the measured costs; reads no clock."""

from __future__ import annotations

from dataclasses import dataclass, field

from spot_core.cadence.hazard import Hazard
from spot_core.cadence.interval import FIRST_S, Costs, optimal_interval_s


@dataclass(slots=True)
class Cadence:
    """Due when the useful time since the last checkpoint has reached the interval.

    fixed_interval_s: pins the interval. hazard: evidence of the lives before this one.
    """

    hazard: Hazard
    fixed_interval_s: float | None = None
    costs: Costs = field(default_factory=Costs)
    last_useful_s: float | None = None
    is_requested: bool = False

    def interval_s(self, *, age_s: float, upload_pending_s: float = 0.0) -> float:
        """The interval that holds now, in seconds of useful time."""
        if self.fixed_interval_s is not None:
            return self.fixed_interval_s
        if self.last_useful_s is None:
            return FIRST_S
        return optimal_interval_s(self.costs, self.hazard, age_s=age_s, upload_pending_s=upload_pending_s)

    def is_due(self, useful_s: float, *, age_s: float, upload_pending_s: float = 0.0) -> bool:
        """Whether to checkpoint at this boundary; useful_s counts this life's training time."""
        if self.is_requested:
            return True
        since = useful_s - (self.last_useful_s or 0.0)
        return since >= self.interval_s(age_s=age_s, upload_pending_s=upload_pending_s)

    def taken(self, useful_s: float) -> None:
        """A snapshot was taken at `useful_s`."""
        self.last_useful_s = useful_s
        self.is_requested = False
