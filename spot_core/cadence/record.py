"""A cadence at one moment, as it is written beside the run: whoever reads it can ask the policy the same questions."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from spot_core.cadence.cadence import Cadence
from spot_core.cadence.hazard import FORGETTING, SHAPES, Evidence
from spot_core.cadence.interval import Costs, Decision, Limits

# Forgetting keeps what one run counts below 1 / (1 - FORGETTING): twice that is absurd. So are a hundred years.
_MOST_COUNT = 2.0 / (1.0 - FORGETTING)
_MOST_HOURS = 1e6
# Ages between which lives end; the hazard's shapes are constant below the first.
_YOUNGEST_H, _OLDEST_H = 1 / 30, 1e5
_ROUNDING = 1e-6
# Of a number that says seconds, hours or counts: no honest one is larger.
_MOST = 1e12

_T = TypeVar("_T", Limits, Costs)


@dataclass(frozen=True, slots=True)
class CadenceRecord:
    """cadence: with everything that it decides from. age_s: of the instance, in seconds. since_s: useful seconds since
    the last checkpoint. upload_pending_s: how long the oldest checkpoint not yet durable had waited."""

    cadence: Cadence
    age_s: float
    since_s: float
    upload_pending_s: float

    def decision(self, *, older_s: float = 0.0, times: float = 1.0) -> Decision:
        """What is decided then, or `older_s` seconds later; times: as if the hazard were so many times as high."""
        return self.cadence.decision(age_s=self.age_s + older_s, upload_pending_s=self.upload_pending_s, times=times)

    def to_json(self) -> dict[str, Any]:
        it = self.cadence
        return {
            "age_s": round(self.age_s, 3),
            "since_s": round(self.since_s, 3),
            "upload_pending_s": round(self.upload_pending_s, 3),
            "evidence": asdict(it.evidence),
            "fleet": asdict(it.fleet),
            # "No bound" may be said as infinity, which JSON does not know.
            "limits": {name: value and min(value, _MOST) for name, value in asdict(it.limits).items()},
            "costs": asdict(it.costs),
            "lead_s": min(it.lead_s, _MOST),
            "began_s": it.began_s,
            "walls_s": [min(wall_s, _MOST) for wall_s in it.walls_s],
            "prior_per_hour": it.prior_per_hour,
        }

    @classmethod
    def from_json(cls, body: Any) -> CadenceRecord:
        """Raises ValueError if it is not one, or holds values that none can have: others may write where it lies."""
        try:
            moment = [_number(body[name]) for name in ("age_s", "since_s", "upload_pending_s")]
            cadence = Cadence(
                evidence=evidence_from_json(body["evidence"]),
                fleet=evidence_from_json(body["fleet"]),
                limits=_read(Limits, body["limits"]),
                costs=_read(Costs, body["costs"]),
                lead_s=_number(body["lead_s"]),
                began_s=_number(body["began_s"]),
                walls_s=tuple(_number(wall_s) for wall_s in body["walls_s"][:8]),
                prior_per_hour=_number(body["prior_per_hour"]),
            )
            if cadence.limits.most_overhead <= 0 or cadence.prior_per_hour <= 0:
                raise ValueError("most_overhead and prior_per_hour are above 0")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no record of a cadence: {error!r}") from error
        return cls(cadence, *moment)


def evidence_from_json(body: Any) -> Evidence:
    """The Evidence whose fields a JSON object holds. Raises ValueError, TypeError or KeyError unless it can be one."""
    counts = [body[name] for name in ("losses", "rescued", "crashes", "process_h")]
    sums = [list(body[name]) for name in ("exposure_h", "log_g")]
    if not all(is_number(value) for value in [*counts, *sums[0], *sums[1]]):
        raise ValueError("a field is not a number")
    if not len(sums[0]) == len(sums[1]) == len(SHAPES):
        raise ValueError("these are sums for other shapes")
    losses, rescued, crashes, process_h = map(float, counts)
    if not (
        0.0 <= rescued <= losses + _ROUNDING <= _MOST_COUNT
        and 0.0 <= crashes <= _MOST_COUNT
        and 0.0 <= process_h <= _MOST_HOURS
        and 0.0 <= sums[0][0] <= _MOST_HOURS
    ):
        raise ValueError("a count or a time that none can have")
    hours = sums[0][0]
    for k, exposure_h, log_g in zip(SHAPES, *sums, strict=True):
        young, old = ((k - 1.0) * math.log(age_h) for age_h in (_YOUNGEST_H, _OLDEST_H))
        if not (
            _is_within(exposure_h, hours * math.exp(old), hours * math.exp(young))
            and _is_within(log_g, losses * old, losses * young)
        ):
            raise ValueError(f"no lives have these sums for the shape {k}")
    return Evidence(losses, rescued, tuple(map(float, sums[0])), tuple(map(float, sums[1])), crashes, process_h)


def _is_within(value: float, low: float, high: float) -> bool:
    margin = _ROUNDING * (1.0 + abs(low) + abs(high))
    return low - margin <= value <= high + margin


def _read(kind: type[_T], body: Any) -> _T:
    """One of these values, whose fields are numbers; None is one only where it is the default."""
    if not isinstance(body, dict):
        raise ValueError(f"{body!r:.100} is no {kind.__name__}")
    found: dict[str, Any] = {
        each.name: None if body[each.name] is None and each.default is None else _number(body[each.name])
        for each in fields(kind)
        if each.name in body
    }
    return kind(**found)


def is_number(value: object) -> bool:
    return type(value) in {int, float} and -_MOST <= value <= _MOST  # type: ignore[operator]


def _number(value: Any) -> float:
    if not is_number(value) or value < 0.0:
        raise ValueError(f"{value!r:.100} is no number of this kind")
    return float(value)
