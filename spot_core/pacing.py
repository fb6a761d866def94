"""Pacing: measures what training and checkpoints cost, and asks the cadence when the next one is due.

Everything on the training thread, but for `record`, which only reads. Useful time is training time: evaluations, the
trainer's own saves, restores and the stall of a snapshot are left out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

from spot_core.agent.client import OpenedRun
from spot_core.agent.lives import Life, spans_of
from spot_core.cadence.cadence import Cadence
from spot_core.cadence.hazard import Evidence, usual_per_hour
from spot_core.cadence.interval import COPIED_BYTES_PER_S, MARGIN_S, Costs, Limits
from spot_core.cadence.record import CadenceRecord
from spot_core.config import SpotConfig
from spot_core.notice.instance import Instance, wall_unix_s
from spot_core.report.decided import sentence

logger = logging.getLogger(__name__)

# An interval that has moved by this factor since it was last told is told again.
_TOLD_AGAIN = 1.25
# Checkpoints whose costs tell how dear one may be.
_REMEMBERED = 20
# The first generation of Google's preemptible instances ends after a day, and does not tell itself apart.
_PREEMPTIBLE_S = {"gcp": 24 * 3600.0}


class Pacer:
    """When to checkpoint, in one life.

    opened: what the agent found. started_unix_s, began: Unix and monotonic seconds when this process began to open it.
    useful_before_s: of the lives before. state_bytes: of a checkpoint, as far as is known.
    """

    def __init__(
        self,
        config: SpotConfig,
        opened: OpenedRun,
        *,
        started_unix_s: float,
        began: float,
        useful_before_s: float,
        state_bytes: int,
    ) -> None:
        instance = opened.instance
        began_s = max(0.0, started_unix_s - instance.booted)
        self._useful_before_s, self._useful_s = useful_before_s, 0.0
        self._born = began - began_s  # monotonic seconds when the instance started
        self._hinted_unix_s: float | None = None
        self._last: float | None = None  # when the step being timed began, None in a pause
        self._take_s: float | None = None  # stall of a snapshot whose gate is still to come
        self._stalls: deque[float] = deque(maxlen=_REMEMBERED)
        self._uploads: deque[float] = deque(maxlen=_REMEMBERED)
        self._steps = 0
        self._pending_s = 0.0
        self._told_s: float | None = None
        self.cadence = Cadence(
            evidence=Evidence.of(spans_of(opened.lives, boot_id=instance.boot_id, instance=instance.id)),
            fleet=opened.fleet,
            limits=Limits(
                shortest_s=config.min_interval_s,
                longest_s=config.max_interval_s,
                most_overhead=config.max_overhead,
                pinned_s=config.interval_s,
                pinned_steps=config.interval_steps,
            ),
            costs=_known_costs(opened.lives, state_bytes),
            lead_s=config.grace_s,
            began_s=began_s,
            walls_s=_walls_s(config, instance, started_unix_s, began_s),
            prior_per_hour=config.prior_per_hour or usual_per_hour(is_spot=instance.is_spot),
        )

    @property
    def rescue_s(self) -> float:
        """Seconds until a checkpoint taken now is durable on the remote: what 9 of 10 took at most, and a margin."""
        costs = self.cadence.costs
        return (
            _most_of(self._stalls, costs.expected_stall_s) + _most_of(self._uploads, costs.upload_s or 0.0) + MARGIN_S
        )

    @property
    def step_s(self) -> float:
        """Seconds from one boundary to the next, at the slower of the usual speeds."""
        costs = self.cadence.costs
        return max(costs.idle_step_s or 0.0, costs.busy_step_s or 0.0)

    @property
    def useful_s(self) -> float:
        """Seconds of training in all lives that led here."""
        return self._useful_before_s + self._useful_s

    def step_started(self) -> None:
        """A step begins: ends a pause."""
        if self._last is None:
            self._last = time.perf_counter()

    def pause(self) -> None:
        """What follows is not training."""
        self._last = None

    def gate_passed(self, waited_s: float) -> None:
        """The optimizer waited so long for a snapshot, if one is being taken."""
        if self._take_s is not None:
            self._stalls.append(self._take_s + waited_s)
            self.cadence.costs = self.cadence.costs.with_stall(self._take_s + waited_s)
            self._take_s = None
            if self._last is not None:
                self._last += waited_s  # stall too

    def step_completed(self, *, is_busy: bool, uploads: Iterable[float]) -> None:
        """Count a step. is_busy: a checkpoint is being written or drained. uploads: seconds of those that ended."""
        now = time.perf_counter()
        costs = self.cadence.costs
        if self._last is not None:
            self._useful_s += now - self._last
            if self._steps > 0:  # a life's first step also compiles, allocates and fills the loader
                costs = costs.with_step(now - self._last, is_busy=is_busy)
        for upload_s in uploads:
            self._uploads.append(upload_s)
            costs = costs.with_upload(upload_s)
        self.cadence.costs = costs
        self._last = now
        self._steps += 1

    def is_due(self, *, upload_pending_s: float, hinted_unix_s: float | None = None) -> bool:
        """Whether to checkpoint now.

        upload_pending_s: how long the oldest checkpoint not yet durable has waited. hinted_unix_s: when the provider
        said that this instance is in danger, None if it did not.
        """
        self._pending_s = upload_pending_s
        # An agent that was started again has not asked yet: that it knows of no hint is none.
        if hinted_unix_s not in {None, self._hinted_unix_s}:
            self._hinted_unix_s = hinted_unix_s
            self.cadence.hint()
        is_due = self.cadence.is_due(
            self._useful_s, age_s=self._age_s(), step=self._steps, upload_pending_s=upload_pending_s
        )
        self._tell()
        return is_due

    def taken(self, stall_s: float) -> None:
        """A snapshot was taken, and stalled training so long until now."""
        self.cadence.taken(self._useful_s, age_s=self._age_s(), step=self._steps)
        self._take_s = stall_s
        if self._last is not None:
            self._last += stall_s  # the stall is not useful time

    def record(self) -> CadenceRecord:
        """Where the cadence stands, to be explained elsewhere."""
        since_s = self._useful_s - (self.cadence.last_useful_s or 0.0)
        return CadenceRecord(replace(self.cadence), self._age_s(), max(0.0, since_s), self._pending_s)

    def _tell(self) -> None:
        decided = self.cadence.decided
        if decided is None or decided.costs.stall_s is None or self.cadence.limits.is_pinned:
            return
        told_s = self._told_s
        if told_s is None or not told_s / _TOLD_AGAIN <= decided.interval_s <= told_s * _TOLD_AGAIN:
            self._told_s = decided.interval_s
            logger.info("cadence: %s", sentence(decided))

    def _age_s(self) -> float:
        return time.monotonic() - self._born


def _walls_s(config: SpotConfig, instance: Instance, started_unix_s: float, began_s: float) -> tuple[float, ...]:
    """Ages of the instance, in seconds, at which it or this process is known to be ended from outside."""
    walls_s = []
    if config.max_runtime_s is not None:
        walls_s.append(began_s + config.max_runtime_s)
    if (ends_unix_s := wall_unix_s(os.environ)) is not None:
        walls_s.append(began_s + ends_unix_s - started_unix_s)
    if instance.is_spot and instance.provider in _PREEMPTIBLE_S:
        walls_s.append(_PREEMPTIBLE_S[instance.provider])
    return tuple(walls_s)


def _known_costs(lives: Sequence[Life], state_bytes: int) -> Costs:
    """Stall and upload as the newest life that measured them did, the stall else from the bytes to copy."""
    for life in reversed(lives):
        with contextlib.suppress(ValueError):
            costs = CadenceRecord.from_json(life.cadence).cadence.costs
            if costs.stall_s is not None:
                return Costs(stall_s=costs.stall_s, upload_s=costs.upload_s)
    return Costs(guessed_stall_s=state_bytes / COPIED_BYTES_PER_S)


def _most_of(measured: Sequence[float], otherwise: float) -> float:
    """What nine of ten of them do not exceed."""
    return sorted(measured)[(9 * len(measured) - 1) // 10] if measured else otherwise
