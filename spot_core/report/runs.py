"""Runs, checkpoints and lives as plain values: the rows of the tables and, field by field, the keys of `--json`.

Units are in the names: `_s` seconds, `_unix_s` Unix time, `_bytes`. A field is added, never renamed or removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spot_core.agent import lives
from spot_core.agent.lives import Life
from spot_core.agent.process import HEARTBEAT_S
from spot_core.errors import ConfigError, CorruptCheckpointError, NewerFormatError, SpotError
from spot_core.report.places import StoredRun, in_parallel
from spot_core.report.units import ago, duration
from spot_core.store import catalog, layout
from spot_core.store.layout import CheckpointName
from spot_core.store.tier import Tier

LOST = "lost"  # the record says running, but the whole instance is gone
LOST_AFTER_S = 3 * HEARTBEAT_S
ALL_LIVES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointView:
    """A committed checkpoint; with error, its manifest could not be read and what comes from it is missing.

    is_newer_format: it could not since a newer release wrote it.
    """

    name: str
    incarnation: int
    step: int
    epoch: float | None = None
    created_unix_s: float | None = None
    age_s: float | None = None
    useful_s: float | None = None
    size_bytes: int | None = None
    files: int | None = None
    native: str | None = None
    pins: str | None = None
    is_complete: bool = False
    notes: tuple[str, ...] = ()
    error: str | None = None
    is_newer_format: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """A run in a list of runs. outcome: how its newest life stands, a word of `spot_core.agent.lives` or `lost`."""

    run: str
    url: str
    framework: str | None = None
    newest_step: int | None = None
    checkpoints: int = 0
    size_bytes: int = 0
    is_complete: bool = False
    heartbeat_unix_s: float | None = None
    heartbeat_age_s: float | None = None
    outcome: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LifeView:
    """One life of the job. steps: how many it added to what it resumed from. A sign of life is a heartbeat or a
    checkpoint; duration_s reaches to the last one, and to now while the life is running."""

    incarnation: int
    host: str
    started_unix_s: float
    duration_s: float
    heartbeat_age_s: float
    outcome: str
    resumed_step: int
    step: int
    steps: int


def checkpoints(tier: Tier, *, now: float) -> list[CheckpointView]:
    """Every committed checkpoint, newest first."""
    ended = catalog.completions(tier)
    views = in_parallel(lambda name: checkpoint(tier, name, name in ended, now=now), catalog.names(tier))
    return [view for view in views if view is not None]


def checkpoint(tier: Tier, name: CheckpointName, is_complete: bool, *, now: float) -> CheckpointView | None:
    """One checkpoint of a tier, None if it is not committed there."""
    try:
        manifest = catalog.read_manifest(tier, name)
    except FileNotFoundError:
        return None  # pruned since it was listed
    except CorruptCheckpointError as error:
        return CheckpointView(
            name=str(name),
            incarnation=name.incarnation,
            step=name.step,
            is_complete=is_complete,
            error=str(error),
            is_newer_format=isinstance(error, NewerFormatError),
        )
    return CheckpointView(
        name=str(name),
        incarnation=name.incarnation,
        step=name.step,
        epoch=manifest.epoch,
        created_unix_s=manifest.created,
        age_s=round(max(0.0, now - manifest.created), 3),
        useful_s=manifest.useful_s,
        size_bytes=manifest.total_bytes,
        files=len(manifest.files),
        native=manifest.native,
        pins=str(manifest.pins) if manifest.pins else None,
        is_complete=is_complete,
        notes=manifest.notes,
    )


def summary(run: StoredRun, *, now: float) -> RunView:
    """One line about a run; a run that cannot be read becomes a line that says why."""
    view = RunView(run=run.name, url=run.tier.url, framework=run.identity.get("framework"), error=run.error)
    if run.error is not None:
        return view
    try:
        stored = checkpoints(run.tier, now=now)
        newest = lives.read_lives(run.tier, most=1)
    except SpotError as error:
        return RunView(run=view.run, url=view.url, framework=view.framework, error=str(error))
    life = life_view(newest[-1], stored, now=now) if newest else None
    return RunView(
        run=view.run,
        url=view.url,
        framework=view.framework,
        newest_step=stored[0].step if stored else None,
        checkpoints=len(stored),
        size_bytes=sum(checkpoint.size_bytes or 0 for checkpoint in stored),
        is_complete=bool(stored) and stored[0].is_complete,
        heartbeat_unix_s=round(now - life.heartbeat_age_s, 3) if life else None,
        heartbeat_age_s=life.heartbeat_age_s if life else None,
        outcome=life.outcome if life else None,
        error=next((checkpoint.error for checkpoint in stored if checkpoint.error), None),
    )


def life_view(life: Life, stored: Sequence[CheckpointView], *, now: float, step: int = 0) -> LifeView:
    """A life as it stands. stored, step: its checkpoints and the journal may know more than its last heartbeat."""
    own = [checkpoint for checkpoint in stored if checkpoint.incarnation == life.incarnation]
    seen = max([life.heartbeat, *(checkpoint.created_unix_s or 0.0 for checkpoint in own)])
    age_s = max(0.0, now - seen)
    outcome = LOST if life.outcome == lives.RUNNING and age_s > LOST_AFTER_S else life.outcome
    until = now if outcome == lives.RUNNING else seen
    step = max([life.step, step, *(checkpoint.step for checkpoint in own)])
    return LifeView(
        incarnation=life.incarnation,
        host=life.host,
        started_unix_s=life.started,
        duration_s=round(max(0.0, until - life.started), 3),
        heartbeat_age_s=round(age_s, 3),
        outcome=outcome,
        resumed_step=life.resumed_step,
        step=step,
        steps=max(0, step - life.resumed_step),
    )


def check_no_active_life(tier: Tier, *, now: float, undone: str, advice: str) -> None:
    """Raise ConfigError if the newest life that has a record is running, as `spot status` shows it.

    undone: what was not done yet, such as `deleted`; advice: why it must not be done now.
    """
    newest = lives.read_lives(tier, most=1)
    life = life_view(newest[-1], checkpoints(tier, now=now), now=now) if newest else None
    if life is not None and life.outcome == lives.RUNNING:
        raise ConfigError(
            f"life {life.incarnation} of {tier.url} is running on {life.host}, last seen "
            f"{ago(round(life.heartbeat_age_s))}: {advice}. Nothing was {undone}. Try again when it has ended; a life "
            f"that vanished counts as ended after {duration(LOST_AFTER_S)}."
        )


def claims_without_record(tier: Tier, recorded: list[LifeView]) -> list[int]:
    """Numbers that were claimed by a life that ended before its first heartbeat, or whose record is unreadable."""
    claimed = {layout.numbered(entry) for entry in tier.list(layout.INCARNATIONS)}
    return sorted(number for number in claimed - {life.incarnation for life in recorded} if number is not None)
