"""The interval between checkpoints, in seconds of useful training time: T* = sqrt(2 · Ceff / h), within bounds.

C is what a checkpoint stalls training, U how long until it is durable, eps the share of training speed lost in the
meantime, h the hazard. Sources: Young 1974, Daly 2006 for the square root; Ceff = C + eps·U adds the slowdown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from spot_core.cadence.hazard import Hazard

SHORTEST_S = 1.0
LONGEST_S = 4 * 3600.0
MOST_OVERHEAD = 0.10
# The first checkpoint of a life comes after this much training: a state or a bucket that cannot be saved is then
# known in the first minute, not after the first kill.
FIRST_S = 1.0
_SMOOTHING = 0.3


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured costs in seconds, smoothed: stall C, upload U, busy and idle step times (their ratio gives eps)."""

    stall_s: float | None = None
    upload_s: float | None = None
    idle_step_s: float | None = None
    busy_step_s: float | None = None

    def with_stall(self, stall_s: float) -> Costs:
        return replace(self, stall_s=_smooth(self.stall_s, stall_s))

    def with_upload(self, upload_s: float) -> Costs:
        return replace(self, upload_s=_smooth(self.upload_s, upload_s))

    def with_step(self, step_s: float, *, is_busy: bool) -> Costs:
        """One step's time; busy while a checkpoint is being written or drained."""
        if is_busy:
            return replace(self, busy_step_s=_smooth(self.busy_step_s, step_s))
        return replace(self, idle_step_s=_smooth(self.idle_step_s, step_s))

    @property
    def slowdown(self) -> float:
        """eps: the share of training speed lost while a checkpoint is written and drained, 0 to 0.9."""
        if not self.idle_step_s or not self.busy_step_s:
            return 0.0
        return min(0.9, max(0.0, 1.0 - self.idle_step_s / self.busy_step_s))

    @property
    def effective_s(self) -> float:
        """Ceff = C + eps · U."""
        return (self.stall_s or 0.0) + self.slowdown * (self.upload_s or 0.0)


def optimal_interval_s(costs: Costs, hazard: Hazard, *, age_s: float, upload_pending_s: float = 0.0) -> float:
    """Useful seconds between checkpoints now.

    age_s: age of the current life. upload_pending_s: how long the oldest checkpoint not yet durable has waited. Half
    of it is the least: each interval of an outage is then as long as the outage was when it began, so that the local
    tier gets a few checkpoints in an outage of any length, and a crash costs no more than half of it.
    """
    effective_s = max(costs.effective_s, 1e-4)
    best = math.sqrt(2.0 * effective_s / hazard.per_second(age_s))
    no_pile_up = max((costs.upload_s or 0.0) - (costs.stall_s or 0.0), upload_pending_s / 2)
    within_overhead = effective_s / MOST_OVERHEAD
    return min(LONGEST_S, max(best, no_pile_up, within_overhead, SHORTEST_S))


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + _SMOOTHING * (new - old)
