"""Numbers as people read them: sizes, durations, ages, counts."""

from __future__ import annotations

import time

_SIZES = ("B", "kB", "MB", "GB", "TB")


def size(count: float) -> str:
    """Bytes in decimal units, as the log lines and the object stores count."""
    for unit in _SIZES:
        if count < 999.5 or unit == _SIZES[-1]:
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"


def duration(seconds: float) -> str:
    """Two units at most: `20ms`, `4.2s`, `48s`, `12m`, `5h 03m`, `2d 04h`."""
    if 0 < seconds < 0.0995:
        return f"{seconds * 1000:.0f}ms" if seconds >= 0.00995 else f"{seconds * 1000:.1f}ms"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.1f}s".replace(".0s", "s") if seconds < 9.95 else f"{seconds:.0f}s"
    if minutes < 90:
        return f"{minutes}m"
    if minutes < 48 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    return f"{hours // 24}d {hours % 24:02d}h"


def ago(seconds: float) -> str:
    """How long ago; clocks of two hosts differ, so the future counts as now."""
    return "now" if seconds < 1 else f"{duration(round(seconds))} ago"


def moment(unix_s: float) -> str:
    """A moment in the reader's own time zone; `?` for what no calendar holds."""
    try:
        return time.strftime("%b %d %H:%M", time.localtime(unix_s))
    except (OverflowError, ValueError, OSError):
        return "?"


def count(number: int, what: str) -> str:
    """`1 step`, `2 steps`, `3 lives`."""
    plural = "lives" if what == "life" else f"{what}s"
    return f"{number:,} {what if number == 1 else plural}"


def share(fraction: float) -> str:
    return f"{fraction:.1%}"
