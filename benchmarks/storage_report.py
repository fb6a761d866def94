"""How the ways of `storage.py` take turns, and what it reports: medians, and ratios to this project's way."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# Does the work once, cleans up, and returns the seconds that the work alone took.
Way = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Row:
    """One way. seconds: median, shortest and longest; all None where it takes no part, for the reason `absent`."""

    way: str
    seconds: float | None
    shortest_s: float | None
    longest_s: float | None
    absent: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """One comparison, fastest first. ours: this project's way, of which all ratios are. bytes, files: of a turn."""

    what: str
    size: str
    bytes: int
    files: int
    repeat: int
    ours: str
    rows: list[Row]


def take_turns(ways: Mapping[str, Way], *, repeat: int) -> list[Row]:
    """The ways take turns, in an order drawn for each round: what comes before moves what a way takes.

    The first round, which opens connections, is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order, drawn = list(ways), random.Random(0)
    for turn in range(repeat + 1):
        drawn.shuffle(order)
        for name in order:
            taken_s = ways[name]()
            if turn:
                seconds[name].append(taken_s)
    rows = [Row(name, statistics.median(taken), min(taken), max(taken)) for name, taken in seconds.items()]
    return sorted(rows, key=lambda row: row.seconds or 0.0)


def table(found: Result) -> str:
    """Ratios first: above 1 this project's way is faster."""
    ours = next(row.seconds for row in found.rows if row.way == found.ours)
    assert ours is not None
    lines = [
        f"{found.what}, {found.size}: {found.bytes / 1e6:,.1f} MB in {found.files} files, medians of {found.repeat}",
        "",
        "| time / ours | MB/s | ms | shortest to longest | way |",
        "|---:|---:|---:|---:|---|",
    ]
    for row in found.rows:
        if row.seconds is None or row.shortest_s is None or row.longest_s is None:
            lines.append(f"| – | – | – | {row.absent} | {row.way} |")
            continue
        lines.append(
            f"| {row.seconds / ours:.2f} | {found.bytes / 1e6 / row.seconds:,.0f} | {row.seconds * 1e3:,.1f} "
            f"| {row.shortest_s * 1e3:,.1f} to {row.longest_s * 1e3:,.1f} | {row.way} |"
        )
    return "\n".join(lines)
