"""Lives to replay: real ones from CSV files, and synthetic ones from known distributions."""

from __future__ import annotations

import csv
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

_HOUR_S = 3600.0
_CAP_S = 24 * _HOUR_S


@dataclass(frozen=True, slots=True)
class TraceLife:
    """One life of an instance.

    lifetime_s: seconds it lived, known to within resolution_s. is_censored: its loss was not seen (stopped by its
    user, or still alive).
    """

    lifetime_s: float
    is_censored: bool
    resolution_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace's series: each is a slot whose lives follow one another, a run of its own."""

    name: str
    series: tuple[tuple[TraceLife, ...], ...]

    @property
    def lives(self) -> list[TraceLife]:
        return [life for lives in self.series for life in lives]

    @property
    def mean_s(self) -> float:
        """Mean time to preemption: all exposure over all preemptions."""
        lost = sum(not life.is_censored for life in self.lives)
        return sum(life.lifetime_s for life in self.lives) / max(1, lost)

    def repeated(self, lives: int, *, seed: int) -> Trace:
        """The series again and again until there are about `lives` lives, each moved within its source's clock tick.

        A source that looks once a minute reports whole minutes: without this a fixed interval could be in luck.
        """
        draw = random.Random(seed)
        times = max(1, round(lives / len(self.lives)))

        def moved(life: TraceLife) -> TraceLife:
            shift_s = draw.uniform(-0.5, 0.5) * life.resolution_s
            return replace(life, lifetime_s=max(1.0, life.lifetime_s + shift_s))

        return replace(self, series=tuple(tuple(map(moved, lives)) for _ in range(times) for lives in self.series))


def read_trace(path: Path) -> Trace:
    """A CSV file with the columns series, start_s, lifetime_s, censored (1: exposure only), resolution_s (optional).

    Raises KeyError for a missing column, ValueError for a value that is no number.
    """
    series: defaultdict[str, list[tuple[float, TraceLife]]] = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            resolution_s = float(row.get("resolution_s") or 0.0)
            life = TraceLife(float(row["lifetime_s"]), bool(int(row["censored"])), resolution_s)
            series[row["series"]].append((float(row["start_s"]), life))
    ordered = [tuple(life for _, life in sorted(lives, key=lambda pair: pair[0])) for lives in series.values()]
    return Trace(path.stem, tuple(ordered))


def read_traces(folder: Path) -> list[Trace]:
    return [read_trace(path) for path in sorted(folder.glob("*.csv"))]


def synthetic_traces(*, series: int = 8, lives: int = 25, seed: int = 0) -> list[Trace]:
    """Exponential, Weibull 0.6, a bathtub that ends at 24 hours, and a rate that drifts from 6 hours to 30 minutes."""
    draw = random.Random(seed)

    def bathtub() -> float:
        # A third die young, the rest wear on until the cap, where the provider ends them.
        return min(
            _CAP_S, draw.expovariate(1 / (0.5 * _HOUR_S)) if draw.random() < 0.35 else draw.gauss(20, 4) * _HOUR_S
        )

    kinds = {
        "synthetic-exponential": lambda _: draw.expovariate(1 / (2 * _HOUR_S)),
        "synthetic-weibull-0.6": lambda _: draw.weibullvariate(1.5 * _HOUR_S, 0.6),
        "synthetic-bathtub-24h": lambda _: max(60.0, bathtub()),
        "synthetic-drift": lambda nth: draw.expovariate(1 / (6 * _HOUR_S * (1 / 12) ** (nth / (lives - 1)))),
    }
    return [
        Trace(
            name,
            tuple(tuple(TraceLife(lifetime(nth), False) for nth in range(lives)) for _ in range(series)),
        )
        for name, lifetime in kinds.items()
    ]
