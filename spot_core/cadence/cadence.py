"""Cadence: decides at a step boundary whether a checkpoint is due. Holds the measured costs; reads no clock."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from spot_core.cadence.hazard import PRIOR_PER_HOUR, Evidence, hazard_now
from spot_core.cadence.interval import Costs, Decision, Limits, decide

# The first checkpoint of a life comes after this much training: a state or a bucket that cannot be saved is then
# known in the first minute, not after the first kill.
FIRST_S = 1.0
# Where a checkpoint is known to be dear, the early one may cost this share of the training before it.
_FIRST_OVERHEAD = 0.02
# A decision that says "not yet" is kept until the instance is older by this share.
_FRESH = 1 / 64
# How often a hint that an instance is in danger comes true.
_HINT_PRECISION = 0.3


@dataclass(slots=True)
class Cadence:
    """Due when the useful time since the last checkpoint has reached the interval.

    evidence: of the lives before this one. fleet: of other runs, where these machines are shared.
    lead_s: how long before a loss a notice comes, 0 if none is expected. Ages are seconds since the instance started:
    began_s is the one at which this process started, walls_s those at which the instance or the job is known to end.
    decided: the last decision, None before the first one.
    """

    evidence: Evidence = field(default_factory=Evidence)
    fleet: Evidence = field(default_factory=Evidence)
    limits: Limits = field(default_factory=Limits)
    costs: Costs = field(default_factory=Costs)
    lead_s: float = 0.0
    began_s: float = 0.0
    walls_s: tuple[float, ...] = ()
    prior_per_hour: float = PRIOR_PER_HOUR
    last_useful_s: float | None = None
    decided: Decision | None = field(default=None, init=False)
    _known: Evidence = field(init=False, repr=False)
    _is_hinted: bool = field(default=False, init=False)
    _last_age_s: float = field(default=-math.inf, init=False)
    _last_step: int = field(default=0, init=False)
    _kept_s: float = field(default=0.0, init=False)
    _fresh_until_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._known = self.evidence + self.fleet

    def decision(self, *, age_s: float, upload_pending_s: float = 0.0, times: float = 1.0) -> Decision:
        """The interval that holds now, with the numbers behind it. times: as if it were so many times as dangerous."""
        hazard = hazard_now(
            self._known,
            age_s=age_s,
            began_s=self.began_s,
            can_rescue=self.costs.rescue_s <= self.lead_s,
            prior_per_hour=self.prior_per_hour,
        )
        if times != 1.0:
            hazard = hazard.times(times)
        return decide(self.costs, hazard, self.limits, upload_pending_s=upload_pending_s)

    def interval_s(self, *, age_s: float, upload_pending_s: float = 0.0) -> float:
        """Useful seconds between the last checkpoint, or the start of this life, and the next one."""
        self.decided = self.decision(age_s=age_s, upload_pending_s=upload_pending_s)
        if self.last_useful_s is not None or self.limits.is_pinned:
            return self.decided.interval_s
        return min(self.decided.interval_s, max(FIRST_S, self.costs.expected_stall_s / _FIRST_OVERHEAD))

    def is_due(self, useful_s: float, *, age_s: float, step: int = 0, upload_pending_s: float = 0.0) -> bool:
        """Whether to checkpoint at this boundary; useful_s and step count this life's training."""
        since = useful_s - (self.last_useful_s or 0.0)
        if age_s < self._fresh_until_s and not self._is_reached(since, step):
            return False
        self._kept_s = self.interval_s(age_s=age_s, upload_pending_s=upload_pending_s)
        self._fresh_until_s = min(age_s * (1.0 + _FRESH), *self._last_calls_s(after_s=age_s))
        return self._is_last_call(age_s) or self._is_reached(since, step)

    def _is_reached(self, since: float, step: int) -> bool:
        if self._is_hinted and _HINT_PRECISION * since > self.costs.effective_s:
            return True
        if self.limits.pinned_steps is not None:
            return step - self._last_step >= self.limits.pinned_steps
        return since >= self._kept_s

    def hint(self) -> None:
        """The provider says that this instance is in danger, without a date: what is at risk is worth a checkpoint."""
        self._is_hinted = True
        self._fresh_until_s = 0.0

    def taken(self, useful_s: float, *, age_s: float = 0.0, step: int = 0) -> None:
        """A snapshot was taken."""
        self.last_useful_s, self._last_age_s, self._last_step = useful_s, age_s, step
        self._is_hinted = False
        self._fresh_until_s = 0.0

    def _last_calls_s(self, *, after_s: float) -> list[float]:
        """Ages after `after_s` at which a checkpoint is just durable before a known end; infinity closes the list."""
        calls = (wall_s - self.costs.rescue_s for wall_s in self.walls_s)
        return [*(call_s for call_s in calls if call_s > after_s), math.inf]

    def _is_last_call(self, age_s: float) -> bool:
        return any(self._last_age_s < wall_s - self.costs.rescue_s <= age_s < wall_s for wall_s in self.walls_s)
