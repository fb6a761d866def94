"""The pictures of `goodput.py`: goodput by policy, and the interval and the hazard over one series' time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from goodput_replay import Setting, follow
from goodput_traces import Trace

matplotlib.use("Agg")

from matplotlib import pyplot

_SHOWN = {"stall_s": 1.0, "upload_s": 20.0, "restart_s": 30.0, "announced": 0.0, "lead_s": 30.0, "slowdown": 0.0}


def plot_goodput(rows: Sequence[Any], path: Path) -> None:
    """One group of points a trace, one point a policy."""
    shown = [row for row in rows if all(getattr(row, name) == value for name, value in _SHOWN.items())]
    traces = list(dict.fromkeys(row.trace for row in shown))
    policies = list(dict.fromkeys(row.policy for row in shown))
    figure, axes = pyplot.subplots(figsize=(11, 5))
    for nth, policy in enumerate(policies):
        found = {row.trace: row.goodput for row in shown if row.policy == policy}
        places = [index + (nth - len(policies) / 2) * 0.08 for index in range(len(traces))]
        marker = "*" if policy == "adaptive" else "_" if policy == "knows-every-death" else "o"
        axes.plot(places, [100 * found[trace] for trace in traces], marker, label=policy, markersize=9)
    axes.set_xticks(range(len(traces)), traces, rotation=20, ha="right")
    axes.set_ylabel("goodput, %")
    axes.set_title("C = 1 s, U = 20 s, R = 30 s, nothing announced")
    axes.legend(fontsize="small")
    axes.grid(axis="y", alpha=0.3)
    _save(figure, path)


def plot_life(trace: Trace, path: Path) -> None:
    """The adaptive policy through the longest series of a trace: what it believed, and what it chose."""
    points = follow(max(trace.series, key=len), Setting(stall_s=1, upload_s=20, restart_s=30, announced=0, lead_s=30))
    hours = [point.at_s / 3600 for point in points]
    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(11, 6))
    upper.fill_between(hours, [p.low for p in points], [p.high for p in points], alpha=0.25, label="90 % credible")
    upper.plot(hours, [point.hazard for point in points], label="hazard")
    upper.set_ylabel("losses per hour")
    upper.set_yscale("log")
    lower.plot(hours, [point.interval_s for point in points], label="interval")
    lower.set_ylabel("interval, s")
    lower.set_xlabel("instance hours of one series; dotted: an instance was lost")
    for axes in (upper, lower):
        for point in points:
            if point.is_lost:
                axes.axvline(point.at_s / 3600, color="grey", linestyle=":", linewidth=0.7)
        axes.legend(loc="upper right", fontsize="small")
    upper.set_title(f"{trace.name}, C = 1 s, U = 20 s")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
