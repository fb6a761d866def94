"""What a tier holds, by its commit records: which checkpoints, and at which of them training ended."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from spot_core.errors import CorruptCheckpointError
from spot_core.store import layout
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.tier import Tier

logger = logging.getLogger(__name__)

# What S3 gives in one answer.
PAGE_NAMES = 1000


@dataclass(frozen=True, slots=True)
class Completion:
    """That training ended at a checkpoint. max_steps: how many it was to last, None if that was not known."""

    max_steps: int | None


@dataclass(frozen=True, slots=True)
class Recent:
    """Committed checkpoints of a tier, newest first: those from `since` on, all of them if that is None.

    manifest: of the newest one, where it was read with them.
    """

    names: list[CheckpointName]
    since: CheckpointName | None = None
    manifest: Manifest | None = None


def names(tier: Tier, *, since: CheckpointName | None = None) -> list[CheckpointName]:
    """Every committed checkpoint of a tier from `since` on, newest first."""
    found = _committed(tier.list(layout.MANIFESTS, after=str(since or "")))
    return sorted(found, reverse=True)


def recent(tier: Tier, guess: Callable[[], CheckpointName | None]) -> Recent:
    """The newest checkpoints of a tier, in one LIST or, where they are more than that gives, in a few.

    guess: one that may be among the newest. Only that it is looked from there depends on it.
    """
    first = tier.list(layout.MANIFESTS, most=PAGE_NAMES)
    if len(first) < PAGE_NAMES:
        return Recent(sorted(_committed(first), reverse=True))
    since = guess()
    newest = names(tier, since=since) if since is not None else []
    return Recent(newest, since) if newest else Recent(names(tier))


def has_newer(tier: Tier, name: CheckpointName | None) -> bool:
    """Whether a tier holds a checkpoint newer than `name`."""
    return any(_committed(tier.list(layout.MANIFESTS, after=f"{name}.json" if name else "")))


def has(tier: Tier, name: CheckpointName) -> bool:
    """Whether a tier holds a checkpoint."""
    return name in _committed(tier.list(layout.MANIFESTS, after=str(name), most=2))


def _committed(entries: Iterable[str]) -> Iterator[CheckpointName]:
    return (name for name in map(layout.committed, entries) if name is not None)


def completions(tier: Tier) -> dict[CheckpointName, int | None]:
    """Checkpoints at which training ended, with the number of steps it was to last."""
    ended = filter(None, map(layout.completed, tier.list(layout.MANIFESTS)))
    found = {name: completion(tier, name) for name in ended}
    return {name: end.max_steps for name, end in found.items() if end is not None}


def completion(tier: Tier, name: CheckpointName) -> Completion | None:
    """Whether training ended at a checkpoint, as a tier knows it.

    A record that cannot be read, or is not signed with the tier's keys, counts for nothing, with a line in the log.
    """
    path = layout.completion(name)
    try:
        data = tier.read(path)
        tier.signing.check(path, data, tier.url)
        return Completion(_max_steps(json.loads(data)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s is not readable and is ignored: %.300r", path, error)
    except CorruptCheckpointError as error:
        logger.warning("%s does not count as the end of training: %s", path, error)
    return None


def mark_complete(tier: Tier, name: CheckpointName, max_steps: int | None) -> None:
    """Record that training ended at a committed checkpoint."""
    path = layout.completion(name)
    tier.create(path, tier.signing.signed(path, (json.dumps({"max_steps": max_steps}) + "\n").encode()))


def _max_steps(body: dict[str, Any]) -> int | None:
    steps = body.get("max_steps")
    if steps is not None and type(steps) is not int:
        raise TypeError(f"max_steps is {steps!r}")
    return steps


def read_manifest(tier: Tier, name: CheckpointName) -> Manifest:
    """Raises FileNotFoundError, or CorruptCheckpointError: damaged, or not signed with the tier's keys."""
    data = tier.read(layout.manifest(name))
    tier.signing.check(layout.manifest(name), data, tier.url)
    return Manifest.from_json(data, name=name)


def sound_names(tier: Tier) -> list[CheckpointName]:
    """As `names`, without those whose manifest is damaged or a stranger's, each told: they make nothing durable."""

    def is_sound(name: CheckpointName) -> bool:
        try:
            read_manifest(tier, name)
        except FileNotFoundError:
            return False
        except CorruptCheckpointError as error:
            logger.warning("checkpoint %s does not count as durable: %s", name, error)
            return False
        return True

    found = names(tier)
    with ThreadPoolExecutor(8) as pool:
        return [name for name, sound in zip(found, pool.map(is_sound, found), strict=True) if sound]
