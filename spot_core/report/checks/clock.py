"""Whether the clocks of this machine and of the store agree: deadlines of notices and ages of lives rely on it."""

from __future__ import annotations

from dataclasses import dataclass

from spot_core.report.checks.finding import Area, Finding
from spot_core.report.units import duration

AREA = Area("clock")

_MOST_S = 30.0
_SET_IT = "set this machine's clock by NTP: systemctl enable --now chronyd, then chronyc tracking"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """When a file was written, by both clocks in Unix seconds. stored: None if the store does not tell."""

    began: float
    ended: float
    stored: float | None

    @property
    def skew_s(self) -> float | None:
        """How far this clock is ahead of the store's, 0 if they may agree: stores tell whole seconds."""
        if self.stored is None:
            return None
        return max(0.0, self.began - 1.0 - self.stored) - max(0.0, self.stored - self.ended - 1.0)


def check_clock(stamp: Stamp | None) -> Finding:
    what = "skew"
    if stamp is None:
        return AREA.skipped(what, "nothing could be written to the remote to compare with")
    skew_s = stamp.skew_s
    if skew_s is None:
        return AREA.skipped(what, "the store does not tell when a file was written")
    if abs(skew_s) <= _MOST_S:
        return AREA.ok(what, f"this clock and the store's differ by {_MOST_S:.0f} s at most", skew_s=round(skew_s, 3))
    side = "ahead of" if skew_s > 0 else "behind"
    detail = f"this clock is {duration(abs(skew_s))} {side} the store's"
    return AREA.warning(what, detail, _SET_IT, skew_s=round(skew_s, 3))
