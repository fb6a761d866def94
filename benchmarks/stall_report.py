"""What `stall.py` reports: medians, and a table with ratios to this project's callback."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from stall_spot import SpotSaver
from stall_turns import Turns

from spot_core.snapshot.trees import byte_count


@dataclass(frozen=True, slots=True)
class Row:
    """One saver. stall_s: median, and the shortest and longest. next_step: median ratio to the step before."""

    saver: str
    stall_s: float
    shortest_s: float
    longest_s: float
    next_step: float
    file_bytes: int


@dataclass(frozen=True, slots=True)
class Result:
    """One size under one trainer. forward_s: median of forward and backward while nothing is saved.

    ours: this project's saver, of which all ratios are.
    """

    size: str
    trainer: str
    tensors: int
    bytes: int
    repeat: int
    forward_s: float
    ours: str
    rows: list[Row]


def result(turns: Turns, *, size: str, trainer: str, repeat: int) -> Result:
    """What was measured, shortest stall first."""
    rows = [
        Row(
            saver=name,
            stall_s=statistics.median(stalls),
            shortest_s=min(stalls),
            longest_s=max(stalls),
            next_step=statistics.median(turns.slowdowns[name]),
            file_bytes=turns.file_bytes[name],
        )
        for name, stalls in turns.stalls.items()
    ]
    rows.sort(key=lambda row: row.stall_s)
    bytes_ = sum(map(byte_count, turns.tensors))
    forward_s = statistics.median(turns.undisturbed)
    return Result(size, trainer, len(turns.tensors), bytes_, repeat, forward_s, SpotSaver.name, rows)


def table(found: Result) -> str:
    """Ratios first, shortest stall at the top."""
    ours = next(row for row in found.rows if row.saver == found.ours)
    lines = [
        f"{found.size}, {found.trainer}: {found.tensors:,} tensors, {found.bytes / 1e6:,.0f} MB, forward and backward "
        f"{found.forward_s * 1e3:,.0f} ms, medians of {found.repeat}",
        "",
        "| stall / ours | stall, ms | shortest to longest | next step | files, MB | saver |",
        "|---:|---:|---:|---:|---:|---|",
    ]
    for row in found.rows:
        span = f"{row.shortest_s * 1e3:.2f} to {row.longest_s * 1e3:.2f}"
        lines.append(
            f"| {row.stall_s / ours.stall_s:.2f} | {row.stall_s * 1e3:.2f} | {span} "
            f"| × {row.next_step:.2f} | {_megabytes(row.file_bytes)} | {row.saver} |"
        )
    return "\n".join(lines)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.{0 if count >= 1e6 else 1}f}" if count else "–"
