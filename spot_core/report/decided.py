"""What was decided about the interval, in words: the sentence in the log.

Imported by every training when it starts, and therefore light: no tables, nothing of the agent.
"""

from __future__ import annotations

from spot_core.cadence.interval import Decision
from spot_core.report.units import duration, share

HOUR_S = 3600.0
# What each bound means, in a sentence that begins with "held".
BOUNDS = {
    "one step": "at the length of a step",
    "upload": "at what an upload takes or has waited, so that uploads do not pile up",
    "max_overhead": "by max_overhead",
    "min_interval_s": "by min_interval_s",
    "max_interval_s": "by max_interval_s",
    "interval_s": "by interval_s, which pins it",
    "interval_steps": "by interval_steps, which pins it",
}


def sentence(decided: Decision) -> str:
    """One line with the numbers that an interval follows from."""
    costs, hazard = decided.costs, decided.hazard
    held = f", held {BOUNDS[decided.bound]}" if decided.bound else ""
    upload = f" + {share(costs.slowdown)} of an upload of {duration(costs.upload_s)}" if costs.upload_s else ""
    rescued = f", {share(hazard.rescued)} of them rescued by a notice" if hazard.rescued else ""
    return (
        f"a checkpoint every {duration(decided.interval_s)} of training{held}. It costs "
        f"{duration(costs.effective_s)} (stall {duration(costs.expected_stall_s)}{upload}); expected are a loss of the "
        f"instance every {every(hazard.losses)} (90 %: {every(hazard.high)} to {every(hazard.low)}){rescued}, and "
        f"a crash every {every(hazard.crashes)}"
    )


def every(per_hour: float) -> str:
    """How long, on the mean, from one to the next of what comes so often."""
    return duration(HOUR_S / per_hour) if per_hour > 0 else "∞"
