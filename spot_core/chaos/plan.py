"""When and how each life of a rehearsal ends: drawn at random or read from a trace, before anything runs.

All ages are seconds since the command was started.
"""

from __future__ import annotations

import csv
import itertools
import math
import random
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from spot_core.chaos.metadata_servers import SERVERS
from spot_core.errors import ConfigError

SIGNAL = "signal"
_COLUMNS = ("lifetime_s", "censored", "series")
_SHOWN_SERIES = 5


class Mode(str, Enum):
    """What a kill takes away."""

    KILL = "kill"
    CRASH = "crash"
    INSTANCE = "instance"


@dataclass(frozen=True, slots=True)
class Notice:
    """Who announces a kill, a provider or SIGNAL for SIGTERM, and how many seconds before."""

    source: str
    lead_s: float

    @classmethod
    def parse(cls, text: str) -> Notice:
        """From `aws:120`. Raises ConfigError."""
        source, _, lead = text.partition(":")
        try:
            lead_s = float(lead)
        except ValueError:
            lead_s = math.nan
        if source not in {*SERVERS, SIGNAL} or not 0.0 < lead_s <= 1e6:
            known = ", ".join((*SERVERS, SIGNAL))
            raise ConfigError(f"--notice {text}: not one of {known}, a colon and the seconds before, as in aws:120")
        return cls(source, lead_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedKill:
    """The end of one life, at the age kill_at_s.

    notice_at_s: the age at which the kill is announced; None for no notice. withdrawn_at_s: the age at which that
    announcement is withdrawn, so that the kill comes unannounced.
    """

    kill_at_s: float
    mode: Mode = Mode.KILL
    notice_at_s: float | None = None
    lead_s: float = 0.0
    withdrawn_at_s: float | None = None


def drawn_ages(mean_s: float, rng: random.Random) -> Iterator[float]:
    """Ages without end, each drawn from 0.5 to 1.5 times the mean."""
    while True:
        yield mean_s * rng.uniform(0.5, 1.5)


def ages_in_trace(file: Path, series: str | None = None) -> list[float]:
    """Ages at which instances were really preempted, in the file's order, from a CSV with `_COLUMNS`.

    A life that ended otherwise (`censored`) is time without a preemption: it is added to the life that follows. Raises
    ConfigError for a file that has no such life, a column that is missing, or a series that is unknown.
    """
    rows = _rows(file)
    if series is not None:
        known = dict.fromkeys(name for name, _, _ in rows)
        rows = [row for row in rows if row[0] == series]
        if not rows:
            some = ", ".join(itertools.islice(known, _SHOWN_SERIES))
            raise ConfigError(f"{file} has no series {series!r}; it has {len(known)}, such as {some}")
    ages, age_s = [], 0.0
    for _, lifetime_s, is_censored in rows:
        age_s += lifetime_s
        if not is_censored:
            ages.append(age_s)
            age_s = 0.0
    if not ages:
        raise ConfigError(f"{file}: no life of {'it' if series is None else repr(series)} was ended by a preemption")
    return ages


def planned(
    ages: Iterable[float],
    *,
    most: int | None,
    mode: Mode = Mode.KILL,
    wipes: Collection[int] = (),
    notice: Notice | None = None,
    is_withdrawn: bool = False,
) -> tuple[PlannedKill, ...]:
    """The kills at `ages`, `most` at most; without an end of either there is no end.

    wipes: kills, counted from 1, that take the instance whatever the mode. notice: comes lead_s before the age, or at
    once where the life is shorter. is_withdrawn: each notice is withdrawn halfway, and the kill comes one more age
    later.
    """
    if is_withdrawn and (notice is None or notice.source == SIGNAL):
        raise ConfigError(f"--withdraw needs a --notice of {', '.join(SERVERS)}: nobody withdraws a signal")
    remaining, kills = iter(ages), []
    for number in itertools.count(1) if most is None else range(1, most + 1):
        age_s = next(remaining, None)
        later_s = next(remaining, None) if is_withdrawn else 0.0
        if age_s is None or later_s is None:
            break
        notice_at_s = None if notice is None else max(0.0, age_s - notice.lead_s)
        lead_s = 0.0 if notice_at_s is None else age_s - notice_at_s
        kills.append(
            PlannedKill(
                kill_at_s=age_s + later_s,
                mode=Mode.INSTANCE if number in wipes else mode,
                notice_at_s=notice_at_s,
                lead_s=lead_s,
                withdrawn_at_s=age_s - lead_s / 2 if is_withdrawn else None,
            )
        )
    return tuple(kills)


def _rows(file: Path) -> list[tuple[str, float, bool]]:
    """Series, lifetime, and whether something else than a preemption ended it."""
    try:
        with file.open(newline="") as stream:
            reader = csv.DictReader(stream)
            missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise ConfigError(f"{file} is no trace: it has no column {', '.join(missing)}")
            return [_row(row, f"{file}, line {reader.line_num}") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error


def _row(row: dict[str, str], place: str) -> tuple[str, float, bool]:
    try:
        lifetime_s = float(row["lifetime_s"])
    except (TypeError, ValueError):
        lifetime_s = math.nan
    if not 0.0 <= lifetime_s < math.inf or row["censored"] not in {"0", "1"}:
        raise ConfigError(f"{place}: lifetime_s must be 0 or more and censored 0 or 1")
    return row["series"], lifetime_s, row["censored"] == "1"
