"""What may be deleted. Nothing goes before a newer checkpoint is committed and verified on the remote tier."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable

from spot_core.store import layout
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.store.tier import Tier

logger = logging.getLogger(__name__)

_TEMPORARY = ".tmp-"
# `<random>-000003.json`, or anything below `000003-000000001200/` or its like in `damaged/`: which life it is of.
_INCARNATION = re.compile(r"(?:[0-9a-f]{32}-|\d{3}-)?(\d{6})[-.]")


def superseded(
    present: Iterable[CheckpointName],
    *,
    keep: int,
    durable: Collection[CheckpointName],
    pinned: Collection[CheckpointName] = (),
) -> list[CheckpointName]:
    """Names of `present` that may be deleted, oldest first.

    keep: how many of the newest stay. durable: names committed and verified on the remote; only what is older
    than the newest of them may go. pinned: names that stay whatever their age.
    """
    ordered = sorted(present, reverse=True)
    newest_durable = max(durable, default=None)
    if newest_durable is None:
        return []
    return [name for name in reversed(ordered[keep:]) if name < newest_durable and name not in pinned]


def milestones(names: Iterable[CheckpointName], *, every: int | None) -> set[CheckpointName]:
    """The first of `names` at or after each multiple of `every` steps; none if `every` is None.

    First means of the oldest life that came so far. A later life that trained again from before it adds its own.
    Deleting any other name, or adding names of later lives, takes none away: what is a milestone stays one.
    """
    if every is None:
        return set()
    found: set[CheckpointName] = set()
    first_steps: dict[int, int] = {}
    for name in sorted(names):
        multiple = name.step // every
        if multiple > 0 and name.step <= first_steps.get(multiple, name.step):
            first_steps[multiple] = name.step
            found.add(name)
    return found


def delete_checkpoints(tier: Tier, doomed: Iterable[CheckpointName]) -> None:
    """Delete manifest first, then files: a crash in between leaves an orphan, never a checkpoint that lies.

    Newest first: what refers to another one goes before that one.
    """
    for name in sorted(doomed, reverse=True):
        tier.delete([layout.manifest(name)])
        tier.delete([layout.checkpoint(name), layout.completion(name)])
        logger.debug("deleted superseded checkpoint %s from %s", name, tier.url)


def sweep_orphans(tier: Tier, committed: Collection[CheckpointName], *, before_incarnation: int) -> int:
    """Delete what crashes of earlier lives left without a manifest; returns how many folders and completion records.

    Only those of earlier incarnations: this life's own may be about to be committed.
    """
    count = 0
    for folder in (layout.CHECKPOINTS, layout.STAGING):
        for entry in tier.list(folder):
            name = CheckpointName.parse(entry)
            if name is None or name.incarnation >= before_incarnation:
                continue
            if folder == layout.STAGING or name not in committed:
                tier.delete([f"{folder}/{entry}"])
                count += 1
    for entry in tier.list(layout.MANIFESTS):
        name = layout.completed(entry)
        if name is not None and name.incarnation < before_incarnation and name not in committed:
            tier.delete([f"{layout.MANIFESTS}/{entry}"])
            count += 1
    if isinstance(tier, PosixTier):
        _sweep_temporaries(tier, before_incarnation=before_incarnation)
    return count


def _sweep_temporaries(tier: PosixTier, *, before_incarnation: int) -> None:
    """Delete what a kill left of files that were being written, by the life in their names or in their folder's."""
    for folder in (layout.CHECKPOINTS, layout.DAMAGED, layout.MANIFESTS, layout.INCARNATIONS, layout.LIVES):
        for path in tier.path(folder).rglob(f"{_TEMPORARY}*"):
            inside = str(path.relative_to(tier.path(folder))).removeprefix(_TEMPORARY)
            found = _INCARNATION.match(inside)
            if found is not None and int(found[1]) < before_incarnation:
                tier.delete([str(path.relative_to(tier.root))])
