"""The interval between checkpoints, in seconds of useful training time: T* = sqrt(2 · Ceff / h), within bounds.

C is what a checkpoint stalls training, U how long until it is durable, eps the share of training speed lost in the
meantime, h the rate of interruptions that no notice rescues. Sources: Young 1974, Daly 2006 for the square root;
Vaidya 1997 for U apart from C; Ceff = C + eps·U adds the slowdown: leaving it out is ruinous when C is tiny.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from spot_core.cadence.hazard import Hazard

# From the notice's arrival to the trainer's next boundary, and for what was not foreseen.
DETECTION_S = 5.0
MARGIN_S = 2.0
# What one thread copies in a second, until a stall was measured.
COPIED_BYTES_PER_S = 2e9
_SMOOTHING = 0.3
# Steps are many, and single ones differ: their slowdown is told by some dozens.
_STEP_SMOOTHING = 0.05
_HOUR_S = 3600.0
# A stall that was not measured, or is below what a clock shows: 0.1 ms.
_SMALLEST_COST_S = 1e-4


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured costs in seconds, smoothed: stall C, upload U, busy and idle step times (their ratio gives eps).

    guessed_stall_s: what stands for the stall until one was measured.
    """

    stall_s: float | None = None
    upload_s: float | None = None
    idle_step_s: float | None = None
    busy_step_s: float | None = None
    guessed_stall_s: float = 0.0

    def with_stall(self, stall_s: float) -> Costs:
        return replace(self, stall_s=_smooth(self.stall_s, stall_s))

    def with_upload(self, upload_s: float) -> Costs:
        return replace(self, upload_s=_smooth(self.upload_s, upload_s))

    def with_step(self, step_s: float, *, is_busy: bool) -> Costs:
        """One step's time; busy while a checkpoint is being written or drained."""
        idle_step_s, busy_step_s = self.idle_step_s, self.busy_step_s
        if is_busy:
            busy_step_s = _smooth(busy_step_s, step_s, _STEP_SMOOTHING)
        else:
            idle_step_s = _smooth(idle_step_s, step_s, _STEP_SMOOTHING)
        # At every step: `replace` takes three times as long.
        return Costs(self.stall_s, self.upload_s, idle_step_s, busy_step_s, self.guessed_stall_s)

    @property
    def expected_stall_s(self) -> float:
        """C: measured, or guessed until then."""
        return self.guessed_stall_s if self.stall_s is None else self.stall_s

    @property
    def slowdown(self) -> float:
        """eps: the share of training speed lost while a checkpoint is written and drained, 0 to 0.9."""
        if not self.idle_step_s or not self.busy_step_s:
            return 0.0
        return min(0.9, max(0.0, 1.0 - self.idle_step_s / self.busy_step_s))

    @property
    def effective_s(self) -> float:
        """Ceff = C + eps · U."""
        return max(_SMALLEST_COST_S, self.expected_stall_s + self.slowdown * (self.upload_s or 0.0))

    @property
    def rescue_s(self) -> float:
        """What a rescue takes after a notice: to see it, to take and upload one checkpoint, and a margin."""
        return DETECTION_S + self.expected_stall_s + (self.upload_s or 0.0) + MARGIN_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The user's bounds.

    shortest_s, longest_s: of the interval. most_overhead: the most of training time that checkpoints may cost.
    pinned_s, pinned_steps: this interval and no other.
    """

    shortest_s: float = 1.0
    longest_s: float = 4 * _HOUR_S
    most_overhead: float = 0.10
    pinned_s: float | None = None
    pinned_steps: int | None = None

    @property
    def is_pinned(self) -> bool:
        return self.pinned_s is not None or self.pinned_steps is not None


@dataclass(frozen=True, slots=True)
class Decision:
    """An interval and the numbers behind it.

    interval_s: useful seconds between checkpoints. best_s: T* before bounds. bound: the name of the one that holds,
    empty if none does.
    """

    interval_s: float
    best_s: float
    bound: str
    hazard: Hazard
    costs: Costs


def decide(costs: Costs, hazard: Hazard, limits: Limits, *, upload_pending_s: float = 0.0) -> Decision:
    """The interval that holds now.

    upload_pending_s: how long the oldest checkpoint not yet durable has waited. Half of it is the least: each interval
    of an outage is then as long as the outage was when it began, so that the local tier gets a few checkpoints in an
    outage of any length, and a crash costs no more than half of it.
    """
    best_s = math.sqrt(2.0 * costs.effective_s / (hazard.unrescued / _HOUR_S))
    floors = {
        "": best_s,
        "one step": costs.idle_step_s or 0.0,
        "upload": max((costs.upload_s or 0.0) - (costs.stall_s or 0.0), upload_pending_s / 2),
        "max_overhead": costs.effective_s / limits.most_overhead,
        "min_interval_s": limits.shortest_s,
    }
    bound = max(floors, key=lambda name: floors[name])
    interval_s = floors[bound]
    if interval_s > limits.longest_s:
        bound, interval_s = "max_interval_s", limits.longest_s
    if limits.pinned_s is not None:
        bound, interval_s = "interval_s", limits.pinned_s
    if limits.pinned_steps is not None:
        bound, interval_s = "interval_steps", limits.pinned_steps * (costs.idle_step_s or 0.0)
    return Decision(interval_s, best_s, bound, hazard, costs)


def _smooth(old: float | None, new: float, share: float = _SMOOTHING) -> float:
    return new if old is None else old + share * (new - old)
