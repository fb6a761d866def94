"""`spot prune`: delete the superseded checkpoints of one run on one tier by hand, by the rules of retention.

Nothing goes before the newest checkpoint was read back whole, and nothing while a life is active: its agent prunes by
itself, and may be about to commit a checkpoint that refers to an old one. Should a life begin meanwhile, pruning stops:
what it could resume from stays in any case. A crash leaves at most a folder without a manifest, for the next sweep.

A manifest that is damaged, or a stranger's, is never deleted and takes the place of nothing. What it refers to cannot
be read. It is the checkpoint before it, or what that one refers to: both stay where it would have stayed itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from spot_core.errors import ConfigError, CorruptCheckpointError, FencedError, NewerFormatError, TierError
from spot_core.report import runs
from spot_core.report.places import in_parallel
from spot_core.report.units import count, size
from spot_core.store import catalog, incarnation, layout, resume, retention
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.resume import OnProgress
from spot_core.store.tier import Tier


@dataclass(frozen=True, slots=True)
class Superseded:
    """A checkpoint that may go."""

    name: CheckpointName
    size_bytes: int


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """What may go and what stays, newest first: what refers to another one goes before that one.

    incarnation: the newest life when this was found.
    unreadable: what stays besides, since its manifest is damaged or not signed with this run's key.
    """

    doomed: tuple[Superseded, ...]
    kept: tuple[CheckpointName, ...]
    unreadable: tuple[CheckpointName, ...]
    incarnation: int

    @property
    def size_bytes(self) -> int:
        return sum(each.size_bytes for each in self.doomed)

    def as_json(self) -> dict[str, Any]:
        """For machines: what `spot prune --json` prints."""
        doomed = [{"name": str(each.name), "size_bytes": each.size_bytes} for each in self.doomed]
        return {
            "size_bytes": self.size_bytes,
            "superseded": doomed,
            "kept": [str(name) for name in self.kept],
            "unreadable": [str(name) for name in self.unreadable],
        }


def plan(tier: Tier, *, keep: int, keep_every: int | None, now: float, on_progress: OnProgress) -> PrunePlan:
    """Find what may go, and read the newest checkpoint back if anything may. Deletes nothing.

    Raises ConfigError (a life is active, or this is a local folder), CorruptCheckpointError (the newest checkpoint is
    damaged), TierError.
    """
    if layout.JOURNAL in tier.list(""):
        raise ConfigError(
            f"{tier.url} is the local folder of a run: what it holds may not be durable anywhere else. Nothing was "
            "deleted. Prune the remote; or drain and prune both with spot agent --once --keep-local N."
        )
    number = incarnation.newest(tier)
    runs.check_no_active_life(tier, now=now, undone="deleted", advice="its agent prunes by itself")
    names = catalog.names(tier)
    read = dict(zip(names, in_parallel(lambda name: _manifest(tier, name), names), strict=True))
    manifests = {name: found for name, found in read.items() if isinstance(found, Manifest)}
    newer = [name for name in names if isinstance(read[name], NewerFormatError)]
    unreadable = [name for name in names if name not in manifests and name not in newer]
    doomed = _superseded(tier, manifests, keep=keep, keep_every=keep_every, newer=newer, unreadable=unreadable)
    if doomed:
        _verify_newest(tier, manifests[max(manifests)], on_progress)
    return PrunePlan(
        doomed=tuple(Superseded(name, manifests[name].total_bytes) for name in doomed),
        kept=tuple(name for name in names if name not in {*doomed, *unreadable}),
        unreadable=tuple(unreadable),
        incarnation=number,
    )


def execute(tier: Tier, found: PrunePlan) -> None:
    """Delete what the plan names, each manifest before its files. Raises FencedError if a life began, TierError."""
    for index, each in enumerate(found.doomed):
        try:
            if incarnation.newest(tier) != found.incarnation:
                raise FencedError(
                    f"a new life of this run began in {tier.url}: its agent prunes from here on. "
                    + _so_far(found, index)
                )
            retention.delete_checkpoints(tier, [each.name])
        except TierError as error:
            raise type(error)(
                f"{error.strerror or error}. {_so_far(found, index)} What is still listed is whole; run the same "
                "command again. Files that lost their manifest go with the sweep of a later life."
            ) from error


def _so_far(found: PrunePlan, index: int) -> str:
    freed = size(sum(each.size_bytes for each in found.doomed[:index]))
    return f"{index} of {count(len(found.doomed), 'checkpoint')} deleted, {freed} freed."


def _superseded(
    tier: Tier,
    manifests: Mapping[CheckpointName, Manifest],
    *,
    keep: int,
    keep_every: int | None,
    newer: Collection[CheckpointName],
    unreadable: Collection[CheckpointName],
) -> list[CheckpointName]:
    newest_first = sorted({*manifests, *newer}, reverse=True)
    milestones = retention.milestones(newest_first, every=keep_every)
    for name in retention.milestones({*newest_first, *unreadable}, every=keep_every).intersection(unreadable):
        milestones.update([each for each in newest_first if each < name][:1])
    pinned = set()
    for name in {*newest_first[:keep], *milestones}:
        if name in newer:
            raise ConfigError(
                f"checkpoint {name} in {tier.url} was committed by a newer release, so what it refers to is not known. "
                "Nothing was deleted. Upgrade spot-callbacks, then prune."
            )
        pin = manifests[name].pins
        if pin is not None:
            pinned.add(pin)
    pinned |= milestones | set(newer)  # what a newer release committed is for that one to delete
    return retention.superseded(newest_first, keep=keep, durable=newest_first[:1], pinned=pinned)[::-1]


def _verify_newest(tier: Tier, newest: Manifest, on_progress: OnProgress) -> None:
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, newest.total_bytes)

    problems = resume.damaged_files(tier, newest, on_bytes)
    if problems:
        raise CorruptCheckpointError(
            f"the newest checkpoint is damaged, older ones may be needed: {problems[0]}. Nothing was deleted. Mend it "
            f"from the run's other copy first: spot repair {tier.url} --from URL."
        )


def _manifest(tier: Tier, name: CheckpointName) -> Manifest | CorruptCheckpointError:
    try:
        return catalog.read_manifest(tier, name)
    except CorruptCheckpointError as error:
        return error
    except FileNotFoundError as error:
        raise TierError(f"{name} vanished from {tier.url} while it was read; nothing was deleted") from error
