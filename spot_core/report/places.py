"""What lies at a URL: one run's folder, or a root with runs directly under it. Reads only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from spot_core.config import absolute_url
from spot_core.errors import ConfigError, CorruptCheckpointError, TierDeniedError, shown
from spot_core.store import layout
from spot_core.store.identity import read_run
from spot_core.store.posix import PosixTier
from spot_core.store.tier import Tier, open_tier

_PARALLEL = 8
_SHOWN = 10

_A = TypeVar("_A")
_B = TypeVar("_B")


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A run's folder and the content of its run.json; error says why that cannot be read."""

    tier: Tier
    identity: Mapping[str, Any]
    error: str | None = None

    @property
    def name(self) -> str:
        return self.tier.url.rpartition("/")[2]


def open_run(url: str, options: Mapping[str, Any], keys: tuple[str, ...] = ()) -> StoredRun:
    """The run whose folder is at `url`. Raises ConfigError, saying what is there, if it is not a run's folder.

    keys: those that its manifests must be signed with, if any.
    """
    tier, entries = _open(url, options, keys)
    run = _run_at(tier) if layout.RUN in entries else None
    if run is not None:
        return run
    runs = _runs_under(url, tier, entries, options, keys)
    if runs:
        raise ConfigError(
            f"{tier.url} is not a run's folder but holds {_listed(run.name for run in runs)}. Name one of them, such "
            f"as {runs[0].tier.url}"
        )
    raise _nothing(tier, entries)


def open_runs(
    url: str, options: Mapping[str, Any], keys: tuple[str, ...] = ()
) -> tuple[StoredRun | None, list[StoredRun]]:
    """The run whose folder is at `url`, or else the runs directly under it. Raises ConfigError if there are none."""
    tier, entries = _open(url, options, keys)
    run = _run_at(tier) if layout.RUN in entries else None
    if run is not None:
        return run, []
    runs = _runs_under(url, tier, entries, options, keys)
    if not runs:
        raise _nothing(tier, entries)
    return None, runs


def address(url: str) -> str:
    """The URL of the tier at `url`, as the tier would tell it, without reaching for it."""
    return shown(absolute_url(url.removeprefix("file://").removeprefix("local://")))


def in_parallel(function: Callable[[_A], _B], items: Iterable[_A]) -> list[_B]:
    """Results in the order of `items`: object stores answer many small reads at once as fast as one."""
    with ThreadPoolExecutor(_PARALLEL) as pool:
        return list(pool.map(function, items))


def _open(url: str, options: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[Tier, list[str]]:
    tier = open_tier(absolute_url(url), options, keys)
    if isinstance(tier, PosixTier) and tier.root.exists() and not tier.root.is_dir():
        raise ConfigError(f"{tier.url} is a file, not a run's folder")
    return tier, tier.list("")


def _run_at(tier: Tier) -> StoredRun | None:
    identity = read_run(tier)
    return StoredRun(tier, identity) if identity is not None else None


def _runs_under(
    url: str, tier: Tier, entries: list[str], options: Mapping[str, Any], keys: tuple[str, ...]
) -> list[StoredRun]:
    if isinstance(tier, PosixTier):
        entries = [entry for entry in entries if tier.path(entry).is_dir()]

    def look(entry: str) -> StoredRun | None:
        try:
            below = open_tier(f"{absolute_url(url)}/{entry}", options, keys)
        except ConfigError:
            return None  # a name that no run can have
        try:
            return _run_at(below)
        except CorruptCheckpointError as error:
            return StoredRun(below, {}, str(error))
        except TierDeniedError:
            return None  # such as lost+found on a disk's root

    return [run for run in in_parallel(look, filter(None, entries)) if run is not None]


def _nothing(tier: Tier, entries: list[str]) -> ConfigError:
    if not entries:
        return ConfigError(f"{tier.url} holds no run: it is empty or does not exist")
    run, inside, _ = tier.url.partition(f"/{layout.CHECKPOINTS}")
    hint = f". Did you mean {run}?" if inside else ""
    return ConfigError(
        f"{tier.url} holds no run: neither it nor a folder directly under it has a {layout.RUN}. "
        f"Found: {_listed(entries)}{hint}"
    )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
