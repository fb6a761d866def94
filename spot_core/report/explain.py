"""Why the next checkpoint is due when it is: what `spot explain` reads and prints."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from spot_core.agent import lives
from spot_core.agent.journal import Journal
from spot_core.agent.lives import Life
from spot_core.cadence.hazard import End
from spot_core.cadence.record import CadenceRecord
from spot_core.errors import ConfigError
from spot_core.report import runs
from spot_core.report.decided import BOUNDS, HOUR_S, every
from spot_core.report.places import StoredRun
from spot_core.report.status import local_run
from spot_core.report.units import count, duration, share
from spot_core.store.identity import check_same_run
from spot_core.store.overflow import Overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainView:
    """The cadence of one life. Rates are per hour, shares 0 to 1.

    interval_s: useful seconds between checkpoints; at_twice_s, at_half_s: if interruptions came twice or half as
    often. best_s: before bounds; bound: the one that holds, empty if none. since_s: useful seconds since the last
    checkpoint when that was recorded. can_rescue: whether a notice comes early enough to count on. lives: how those
    before this one ended.
    """

    run: str
    incarnation: int
    outcome: str
    interval_s: float
    interval_steps: int | None
    since_s: float
    best_s: float
    bound: str
    at_twice_s: float
    at_half_s: float
    age_s: float
    lives: dict[str, int]
    lived_s: float
    losses_per_hour: float
    low_per_hour: float
    high_per_hour: float
    rescued: float
    can_rescue: bool
    rescue_s: float
    lead_s: float
    crashes_per_hour: float
    unrescued_per_hour: float
    stall_s: float
    upload_s: float | None
    slowdown: float
    cost_s: float
    fleet_losses: float
    fleet_hours: float
    walls_in_s: tuple[float, ...]


def explain(run: StoredRun, local: Path | None, *, now: float) -> ExplainView:
    """The newest cadence that a life of the run has recorded, asked again now if that life is running.

    local: the run's folder on this host, which knows it as of the last checkpoint. Raises ConfigError if none has
    recorded one, or if that folder holds no run or another one.
    """
    history = lives.read_lives(run.tier)
    journal = _journals(run, local) if local is not None else lambda _: None
    index, life, record = _newest(run, history, journal)
    view = runs.life_view(life, [], now=now)
    silent_s = max(0.0, now - life.heartbeat) if view.outcome == lives.RUNNING else 0.0
    older_s = max(0.0, life.began_s + life.duration_s + silent_s - record.age_s)
    decided, twice, half = (record.decision(older_s=older_s, times=times) for times in (1.0, 2.0, 0.5))
    costs, hazard, cadence = decided.costs, decided.hazard, record.cadence
    before = history[:index]
    ends = Counter(span.end for span in lives.spans_of(before, boot_id=life.boot_id, instance=life.instance))
    age_s = record.age_s + older_s
    return ExplainView(
        run=run.name,
        incarnation=life.incarnation,
        outcome=view.outcome,
        interval_s=round(decided.interval_s, 3),
        interval_steps=max(1, round(decided.interval_s / costs.idle_step_s)) if costs.idle_step_s else None,
        since_s=round(record.since_s, 3),
        best_s=round(decided.best_s, 3),
        bound=decided.bound,
        at_twice_s=round(twice.interval_s, 3),
        at_half_s=round(half.interval_s, 3),
        age_s=round(age_s, 3),
        lives={end.value: ends[end] for end in End},
        lived_s=round(sum(each.duration_s for each in before), 3),
        losses_per_hour=hazard.losses,
        low_per_hour=hazard.low,
        high_per_hour=hazard.high,
        rescued=hazard.rescued,
        can_rescue=costs.rescue_s <= cadence.lead_s,
        rescue_s=round(costs.rescue_s, 3),
        lead_s=cadence.lead_s,
        crashes_per_hour=hazard.crashes,
        unrescued_per_hour=hazard.unrescued,
        stall_s=costs.expected_stall_s,
        upload_s=costs.upload_s,
        slowdown=costs.slowdown,
        cost_s=costs.effective_s,
        fleet_losses=round(cadence.fleet.losses, 3),
        fleet_hours=round(cadence.fleet.exposure_h[0], 3),
        walls_in_s=tuple(round(wall_s - age_s, 3) for wall_s in cadence.walls_s if wall_s > age_s),
    )


def _journals(run: StoredRun, local: Path) -> Callable[[int], Any]:
    """What the folder on this host knows of the cadence of a life."""
    tier, found = local_run(local, run.name, run.tier.signing)
    check_same_run(tier, run.identity)
    overflow = Overflow.of(run.tier, found["run_id"])
    return lambda number: Journal(tier.root, number, overflow).read_cadence()


def _newest(run: StoredRun, history: Sequence[Life], journal: Callable[[int], Any]) -> tuple[int, Life, CadenceRecord]:
    """The newest life with a record that can be read, and its place in the history."""
    for index in reversed(range(len(history))):
        life = history[index]
        for body in (journal(life.incarnation), life.cadence):
            with contextlib.suppress(ValueError):
                return index, life, CadenceRecord.from_json(body)
    raise ConfigError(
        f"no life of {run.tier.url} has recorded why it checkpoints when it does: that is written in the first "
        "seconds of training, and brought to the remote within a minute. Nothing was changed; ask again then."
    )


def explain_report(view: ExplainView) -> RenderableType:
    """What `spot explain` prints."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    steps = f", about {count(view.interval_steps, 'step')}" if view.interval_steps else ""
    held = f"\nheld {BOUNDS[view.bound]}" if view.bound else ""
    grid.add_row("interval", Text(f"{duration(view.interval_s)} of training{steps}", style="bold") + held)
    grid.add_row("since the last one", f"{duration(view.since_s)} when this was recorded")
    grid.add_row("lives before", _lives(view))
    grid.add_row("this instance", f"{duration(view.age_s)} old")
    grid.add_row(
        "losses expected",
        f"one every {every(view.losses_per_hour)} (90 %: {every(view.high_per_hour)} to {every(view.low_per_hour)})",
    )
    grid.add_row("rescued by a notice", _rescued(view))
    grid.add_row("crashes expected", f"one every {every(view.crashes_per_hour)}")
    upload = "no upload measured yet"
    if view.upload_s is not None:
        upload = f"{share(view.slowdown)} of the speed lost during an upload of {duration(view.upload_s)}"
    grid.add_row("a checkpoint costs", f"{duration(view.cost_s)}: a stall of {duration(view.stall_s)}, and {upload}")
    grid.add_row(
        "best without bounds",
        f"√(2 × {duration(view.cost_s)} × {every(view.unrescued_per_hour)}) = {duration(view.best_s)}",
    )
    grid.add_row("if twice as often", duration(view.at_twice_s))
    grid.add_row("if half as often", duration(view.at_half_s))
    if view.fleet_losses or view.fleet_hours:
        fleet = f"{view.fleet_losses:.1f} losses in {duration(view.fleet_hours * HOUR_S)} count besides the run's own"
        grid.add_row("the fleet's lives", fleet)
    for wall_s in view.walls_in_s:
        grid.add_row("known end", f"in {duration(wall_s)}: a checkpoint is durable right before")
    title = Text.assemble((view.run, "bold"), f", life {view.incarnation}, {view.outcome}")
    return Group(title, "", grid)


def _lives(view: ExplainView) -> str:
    named = {
        End.LOST: "lost with their instance",
        End.RESCUED: "rescued by a notice",
        End.CRASHED: "crashed",
        End.QUIET: "ended by themselves",
    }
    told = [f"{view.lives[end.value]} {words}" for end, words in named.items() if view.lives[end.value]]
    return f"{', '.join(told)}; {duration(view.lived_s)} in all" if told else "none: these are what is usual here"


def _rescued(view: ExplainView) -> str:
    needed = f"a rescue takes {duration(view.rescue_s)}, a notice comes {duration(view.lead_s)} before"
    return f"{share(view.rescued)} ({needed})" if view.can_rescue else f"not counted on: {needed}"
