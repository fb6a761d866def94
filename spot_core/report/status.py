"""`spot status`: one run as it stands, and with its local folder at hand, what has not reached the remote yet.

Where the remote cannot be read, the local folder tells what this host knows: its own lives, and what its agents last
knew to be durable.

Goodput here is useful training time in the newest checkpoint over the time of all lives: what a preemption threw
away, what a resume cost and what is not yet committed all count against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from spot_core.agent import lives
from spot_core.agent.journal import AgentStatus, Journal
from spot_core.config import run_name
from spot_core.errors import ConfigError, CorruptCheckpointError
from spot_core.report import places, runs
from spot_core.report.places import StoredRun
from spot_core.report.runs import CheckpointView, LifeView
from spot_core.store import catalog, identity, incarnation, layout
from spot_core.store.layout import CheckpointName
from spot_core.store.overflow import Overflow
from spot_core.store.posix import PosixTier
from spot_core.store.signing import Signing
from spot_core.store.tier import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentView:
    """The agent of the newest life on this host. is_alive: its process exists and has not finished its work."""

    pid: int
    is_alive: bool
    draining: str | None
    done_bytes: int
    total_bytes: int
    failures: int
    last_failure: str | None
    fence: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalView:
    """The local folder against the remote. undrained: local commits newer than what is durable, newest first.

    in_memory: which of them a full disk sent to the overflow. remote_only: why checkpoints go to the remote without the
    local disk, None if they do not.
    step, useful_s: where training is, from the journal. gap_steps, gap_s: training beyond the newest durable
    checkpoint, which the loss of this instance would cost.
    """

    folder: str
    incarnation: int
    newest: str | None
    undrained: tuple[str, ...]
    undrained_bytes: int
    step: int | None
    useful_s: float | None
    gap_steps: int | None
    gap_s: float | None
    agent: AgentView | None
    in_memory: tuple[str, ...] = ()
    remote_only: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusView:
    """A run as it stands. remote_error: why the remote cannot be read; then all of this is what one host knows.

    useful_s: of the newest durable checkpoint, None if this host has no copy that says so.
    """

    run: str
    url: str
    run_id: str
    framework: str
    created_unix_s: float | None
    facts: dict[str, Any]
    lives: list[LifeView]
    claims_without_record: list[int]
    checkpoints: int
    size_bytes: int
    newest_durable: CheckpointView | None
    damaged_manifests: list[str]
    is_complete: bool
    useful_s: float | None
    lives_duration_s: float
    goodput: float | None
    local: LocalView | None = field(default=None)
    remote_error: str | None = None


def status(run: StoredRun, local: Path | None, *, now: float) -> StatusView:
    """Everything known about a run. local: its folder on this host, or the folder above, shared by runs.

    Raises ConfigError if that folder holds no run or another one.
    """
    stored = runs.checkpoints(run.tier, now=now)
    here = None
    if local is not None:
        tier, found = local_run(local, run.name, run.tier.signing)
        identity.check_same_run(tier, run.identity)
        here = _local(tier, Overflow.of(run.tier, found["run_id"]), _newest(stored))
    return _view(run.name, run.tier.url, run.tier, run.identity, stored, here, now=now)


def status_of_host(url: str, local: Path, keys: tuple[str, ...], *, remote_error: str, now: float) -> StatusView:
    """What this host knows of a run whose remote cannot be read. Raises ConfigError if that folder holds no run."""
    name, url = run_name(url), places.address(url)
    signing = Signing(name, keys)
    tier, found = local_run(local, name, signing)
    overflow = Overflow.at(url, found["run_id"], signing)
    stored = _last_known_durable(tier, overflow, now=now)
    here = _local(tier, overflow, _newest(stored))
    return _view(name, url, tier, found, stored, here, now=now, remote_error=remote_error)


def _view(
    name: str,
    url: str,
    records: Tier,
    run: Mapping[str, Any],
    stored: list[CheckpointView],
    local: LocalView | None,
    *,
    now: float,
    remote_error: str | None = None,
) -> StatusView:
    """records: the tier whose lives and claims are shown. run: the content of run.json. stored: on the remote."""
    newest = _newest(stored)
    history = [
        runs.life_view(life, stored, now=now, step=_step(local, life.incarnation))
        for life in lives.read_lives(records, most=runs.ALL_LIVES)
    ]
    useful_s = newest.useful_s if newest else 0.0
    duration_s = round(sum(life.duration_s for life in history), 3)
    is_rated = remote_error is None and useful_s is not None and duration_s > 0
    return StatusView(
        run=name,
        url=url,
        run_id=run["run_id"],
        framework=run["framework"],
        created_unix_s=run["created"],
        facts=dict(run["facts"]),
        lives=history,
        claims_without_record=runs.claims_without_record(records, history),
        checkpoints=len(stored),
        size_bytes=sum(checkpoint.size_bytes or 0 for checkpoint in stored),
        newest_durable=newest,
        damaged_manifests=[checkpoint.error for checkpoint in stored if checkpoint.error is not None],
        is_complete=newest is not None and newest.is_complete,
        useful_s=useful_s,
        lives_duration_s=duration_s,
        goodput=round((useful_s or 0.0) / duration_s, 4) if is_rated else None,
        local=local,
        remote_error=remote_error,
    )


def _newest(stored: Sequence[CheckpointView]) -> CheckpointView | None:
    return next((checkpoint for checkpoint in stored if checkpoint.error is None), None)


def local_run(folder: Path, name: str, signing: Signing) -> tuple[PosixTier, dict[str, Any]]:
    """A run's local tier, at `folder` or in it under the run's name, and its run.json. Raises ConfigError."""
    for place in (folder, folder / name):
        tier = PosixTier(place, signing)
        if (found := identity.read_run(tier)) is not None:
            return tier, found
    raise ConfigError(f"{PosixTier(folder).url} holds no local copy of run {name}: there is no {layout.RUN}")


def _last_known_durable(tier: PosixTier, overflow: Overflow, *, now: float) -> list[CheckpointView]:
    """What the newest agent that knew of any knew to be on the remote, newest first; details where a copy is here."""
    ended = catalog.completions(tier)
    for number in range(incarnation.newest(tier), 0, -1):
        status = Journal(tier.root, number, overflow).read_status()
        found = filter(None, map(CheckpointName.parse, status.durable)) if status is not None else ()
        if names := sorted(found, reverse=True):
            views = [(name, runs.checkpoint(tier, name, name in ended, now=now)) for name in names]
            return [
                view
                if view is not None and view.error is None
                else CheckpointView(name=str(name), incarnation=name.incarnation, step=name.step)
                for name, view in views
            ]
    return []


def _local(tier: PosixTier, overflow: Overflow, newest: CheckpointView | None) -> LocalView:
    """newest: what is durable on the remote, its useful_s None if that is not known."""
    durable = CheckpointName.parse(newest.name) if newest else None
    memory = overflow.tier
    over = set(overflow.names())
    here = sorted({*catalog.names(tier), *over}, reverse=True)
    undrained = [name for name in here if durable is None or name > durable]
    number = incarnation.newest(tier)
    journal = Journal(tier.root, number, overflow)
    progress, agent = journal.read_progress(), journal.read_status()
    behind = progress is not None and (durable is None or number >= durable.incarnation)
    durable_step, durable_s = (newest.step, newest.useful_s) if newest else (0, 0.0)
    return LocalView(
        folder=tier.url,
        incarnation=number,
        newest=str(here[0]) if here else None,
        undrained=tuple(map(str, undrained)),
        undrained_bytes=sum(
            _size_bytes(memory if memory is not None and name in over else tier, name) for name in undrained
        ),
        step=progress.step if progress else None,
        useful_s=round(progress.useful_s, 3) if progress else None,
        gap_steps=max(0, progress.step - durable_step) if progress and behind else None,
        gap_s=round(max(0.0, progress.useful_s - durable_s), 3)
        if progress and behind and durable_s is not None
        else None,
        agent=_agent(agent) if agent else None,
        in_memory=tuple(str(name) for name in undrained if name in over),
        remote_only=(progress.remote_only if progress else "") or None,
    )


def _step(local: LocalView | None, number: int) -> int:
    return local.step or 0 if local is not None and local.incarnation == number else 0


def _agent(status: AgentStatus) -> AgentView:
    return AgentView(
        pid=status.pid,
        is_alive=not status.is_finished and _is_agent(status.pid),
        draining=status.draining,
        done_bytes=status.done_bytes,
        total_bytes=status.total_bytes,
        failures=status.failures,
        last_failure=status.last_failure,
        fence=status.fence,
    )


def _is_agent(pid: int) -> bool:
    """Whether the process of that number is an agent: after a reboot the number may be anyone's."""
    try:
        return "spot_core.agent" in psutil.Process(pid).cmdline()
    except (psutil.Error, ValueError):
        return False


def _size_bytes(tier: PosixTier, name: CheckpointName) -> int:
    try:
        return catalog.read_manifest(tier, name).total_bytes
    except (FileNotFoundError, CorruptCheckpointError):
        return 0
