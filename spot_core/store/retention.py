"""What may be deleted. Nothing goes before a newer checkpoint is committed and verified on the remote tier."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

from spot_core.store import layout
from spot_core.store.layout import CheckpointName
from spot_core.store.tier import Tier

logger = logging.getLogger(__name__)


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
    """Delete manifest first, then files: a crash in between leaves an orphan, never a checkpoint that lies."""
    for name in doomed:
        tier.delete([layout.manifest(name)])
        tier.delete([layout.checkpoint(name), layout.completion(name)])
        logger.debug("deleted superseded checkpoint %s from %s", name, tier.url)


def sweep_orphans(tier: Tier, committed: Collection[CheckpointName], *, before_incarnation: int) -> int:
    """Delete what crashes of earlier lives left without a manifest; returns how many folders.

    Only folders of earlier incarnations: this life's own may be about to be committed.
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
    return count
