"""What many runs learn about a pool of instances together: `<fleet>/pools/<pool>/<run_id>.json`, rewritten by its run.

A pool is `provider/region/zone/type` (Instance.pool). A run never counts its own file. Only what concerns instances is
shared: how often a program crashes is its own affair. All of it is an aid: a record that is damaged, absurd or of a
newer format is left out, and what is taken over counts so little that a run's own lives soon outweigh it.
"""

from __future__ import annotations

import json
import logging
import re
import time
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import NamedTuple, TypeVar

from spot_core.agent.lives import RUNNING, Life, end_of, spans_of
from spot_core.bounded import NoAnswer, within
from spot_core.cadence.hazard import End, Evidence, LifeSpan
from spot_core.cadence.record import evidence_from_json, is_number
from spot_core.errors import CorruptCheckpointError, TierError
from spot_core.store.tier import Tier

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_POOLS = "pools"
_UNKNOWN = "unknown"
# Training waits for it, and so do the heartbeats and the agent's end.
_PATIENCE_S = 10.0
# Of one pool or of all its neighbours, at most.
_MOST_RECORDS = 500
_MOST_PLACES = 100
_PARALLEL = 16
_RECORD_BYTES = 4096

# Ten losses fix a rate to about a third, which moves the interval by a sixth: more would gain little, and ten losses
# of the run itself then weigh as much. A quiet pool has few losses in many hours, which weigh too: thirty at most, so
# that ten own losses at one an hour pull the estimate past the middle from a fleet that says a tenth of that.
MOST_LOSSES = 10.0
MOST_EXPOSURE_H = 30.0
# Below both, a pool is too little known, and its neighbours are asked.
_FEW_LOSSES = 5.0
_FEW_HOURS = 20.0
_OTHER_ZONES = 0.5
_OTHER_REGIONS = 0.25

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_PART = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,198}[a-z0-9])?")
_UNREADABLE = (ValueError, TypeError, KeyError, OverflowError, RecursionError, FileNotFoundError, TierError)

_T = TypeVar("_T")
_R = TypeVar("_R")


class _Pool(NamedTuple):
    provider: str
    region: str
    zone: str
    type: str

    @classmethod
    def parse(cls, text: str) -> _Pool:
        """Raises ValueError for what is no path of four plain names: it becomes one in the fleet's folder."""
        parts = text.split("/")
        if len(parts) != 4 or not all(map(_PART.fullmatch, parts)):
            raise ValueError(f"{text!r} is not a pool: provider/region/zone/type")
        return cls(*parts)

    @property
    def folder(self) -> str:
        return "/".join((_POOLS, *self))


class _NewerFormatError(ValueError):
    pass


class FleetMember:
    """A run in a fleet: what it takes from the others when a life begins, and what it leaves them.

    before: the run's earlier lives, oldest first. life: this one as it begins. Nothing here ends a training: what the
    fleet's folder does not take or give is told once.
    """

    def __init__(self, tier: Tier, run_id: str, before: Sequence[Life], life: Life) -> None:
        self._tier, self._run_id, self._life = tier, run_id, life
        self._spans: dict[str, list[LifeSpan]] = {}
        spans = spans_of(before, boot_id=life.boot_id, instance=life.instance)
        for each, span in zip(before, spans, strict=True):
            self._spans.setdefault(each.pool, []).append(span)
        self._is_told = False

    def learn(self) -> Evidence:
        """What the others have seen of the pool where this life runs."""
        if not self._life.pool:
            self._tell("it is not known which provider's instance this is: nothing is shared")
            return Evidence()
        try:
            return within(_PATIENCE_S, lambda: read_pool(self._tier, self._life.pool, but_run_id=self._run_id))
        except (TierError, ValueError, NoAnswer) as error:
            self._tell(f"what other runs have seen is not known: {error}")
            return Evidence()

    def share_all(self) -> None:
        """Leave what this run has seen of every pool that it has lived in."""
        for pool, spans in self._spans.items():
            self._publish(pool, spans)

    def share(self, life: Life) -> None:
        """Leave what it has seen of the present pool, this life included: as exposure, until it has ended."""
        end = End.QUIET if life.outcome == RUNNING else end_of(life)
        span = LifeSpan(life.duration_s, end, began_s=life.began_s)
        self._publish(life.pool, [*self._spans.get(life.pool, []), span])

    def _publish(self, pool: str, spans: list[LifeSpan]) -> None:
        if not pool:
            return
        evidence = Evidence.of(spans)
        try:
            within(_PATIENCE_S, lambda: publish(self._tier, pool, self._run_id, evidence))
        except (TierError, ValueError, NoAnswer) as error:
            self._tell(f"what this run has seen is not shared: {error}")

    def _tell(self, what: str) -> None:
        level = logging.DEBUG if self._is_told else logging.WARNING
        self._is_told = True
        logger.log(level, "fleet %s: %s. Training is not affected.", self._tier.url, what)


def publish(tier: Tier, pool: str, run_id: str, evidence: Evidence) -> None:
    """Write what a run has seen of a pool, over what it wrote before. Nothing if the pool is unknown (empty).

    Raises TierError, and ValueError for a pool, a run id or evidence that cannot be.
    """
    if not pool:
        return
    path = f"{_Pool.parse(pool).folder}/{_checked_run_id(run_id)}.json"
    body = {"format_version": FORMAT_VERSION, "run_id": run_id, "updated": time.time(), "evidence": asdict(evidence)}
    evidence_from_json(body["evidence"])
    tier.replace(path, tier.signing.signed(path, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()))


def read_pool(tier: Tier, pool: str, *, but_run_id: str) -> Evidence:
    """What the other runs have seen of a pool, and of its neighbours if that is little; none if the pool is unknown.

    Counts as MOST_LOSSES losses and MOST_EXPOSURE_H hours at most. Raises TierError if the pool cannot be listed.
    """
    if not pool:
        return Evidence()
    own = _Pool.parse(pool)
    found = _seen(tier, [own], but_run_id, tier.list(own.folder))
    if own.type != _UNKNOWN:
        for weight, places in ((_OTHER_ZONES, _zones_beside), (_OTHER_REGIONS, _regions_beside)):
            if found.losses >= _FEW_LOSSES or found.exposure_h[0] >= _FEW_HOURS:
                break
            found += _seen(tier, places(tier, own), but_run_id).scaled(weight)
    return _capped(replace(found, crashes=0.0, process_h=0.0))


def _capped(evidence: Evidence) -> Evidence:
    excess = max(evidence.losses / MOST_LOSSES, evidence.exposure_h[0] / MOST_EXPOSURE_H)
    return evidence.scaled(1.0 / excess) if excess > 1.0 else evidence


# -- places --------------------------------------------------------------------------------------------------------


def _zones_beside(tier: Tier, own: _Pool) -> list[_Pool]:
    """The pools of the same type in the other zones of the region."""
    zones = _folders(tier, f"{_POOLS}/{own.provider}/{own.region}")
    return [own._replace(zone=zone) for zone in zones if zone != own.zone]


def _regions_beside(tier: Tier, own: _Pool) -> list[_Pool]:
    """The pools of the same type in the other regions."""
    regions = [region for region in _folders(tier, f"{_POOLS}/{own.provider}") if region != own.region]
    zones = _at_once(lambda region: _folders(tier, f"{_POOLS}/{own.provider}/{region}"), regions)
    pairs = [(region, zone) for region, found in zip(regions, zones, strict=True) for zone in found]
    return [own._replace(region=region, zone=zone) for region, zone in pairs[:_MOST_PLACES]]


def _folders(tier: Tier, folder: str) -> list[str]:
    return _entries(tier, folder)[:_MOST_PLACES]


def _entries(tier: Tier, folder: str) -> list[str]:
    """Empty for what cannot be listed: somebody's file where a folder would be, for one."""
    try:
        return tier.list(folder)
    except TierError as error:
        logger.debug("fleet: %s is left out: %s", folder, error)
        return []


# -- records -------------------------------------------------------------------------------------------------------


def _seen(tier: Tier, pools: Sequence[_Pool], but_run_id: str, entries: list[str] | None = None) -> Evidence:
    """The sum of the records of these pools. entries: of the only pool, where they are known."""
    listed = [entries] if entries is not None else _at_once(lambda pool: _entries(tier, pool.folder), pools)
    names = [
        (entry.removesuffix(".json"), f"{pool.folder}/{entry}")
        for pool, found in zip(pools, listed, strict=True)
        for entry in found
        if entry.endswith(".json") and _RUN_ID.fullmatch(entry.removesuffix(".json"))
    ]
    chosen = _sample([name for name in names if name[0] != but_run_id], but_run_id)
    read = _at_once(lambda name: _read(tier, name[1], name[0]), chosen)
    left_out = [error for error in read if isinstance(error, Exception)]
    if left_out:
        level = logging.DEBUG if all(isinstance(error, _NewerFormatError) for error in left_out) else logging.WARNING
        where = pools[0].folder + (f" and {len(pools) - 1} more" if len(pools) > 1 else "")
        text = "fleet: %d of %d records in %s/%s are left out, such as: %.300r"
        logger.log(level, text, len(left_out), len(chosen), tier.url, where, left_out[0])
    return sum((each for each in read if isinstance(each, Evidence)), Evidence())


def _sample(names: list[tuple[str, str]], but_run_id: str) -> list[tuple[str, str]]:
    """As many as are read. Run ids are random: those that follow the own one are a fair choice, another for each run.

    A listing tells no age: which are the newest is not known before they are read.
    """
    names = sorted(names)
    start = bisect(names, (but_run_id, ""))
    return (names[start:] + names[:start])[:_MOST_RECORDS]


def _read(tier: Tier, path: str, run_id: str) -> Evidence | Exception:
    try:
        data = tier.read(path)
        if len(data) > _RECORD_BYTES:
            raise ValueError(f"{path} has {len(data)} bytes")
        tier.signing.check(path, data, tier.url)
        body = json.loads(data)
        version = body["format_version"]
        if type(version) is int and version > FORMAT_VERSION:
            raise _NewerFormatError(f"{path} has format version {version}")
        if version != FORMAT_VERSION or body["run_id"] != run_id or not is_number(body["updated"]):
            raise ValueError(f"{path} is of another run or version")
        return evidence_from_json(body["evidence"])
    except (*_UNREADABLE, CorruptCheckpointError) as error:
        return error


def _checked_run_id(run_id: str) -> str:
    if not _RUN_ID.fullmatch(run_id):
        raise ValueError(f"{run_id!r} is not a run id")
    return run_id


def _at_once(function: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    with ThreadPoolExecutor(_PARALLEL) as pool:
        return list(pool.map(function, items))
