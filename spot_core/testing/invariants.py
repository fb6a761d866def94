"""What must hold on the two tiers of a run after any history of commits, drains, crashes and deletions.

Each function raises AssertionError, or the error that a reader would meet, and changes nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

from spot_core.store import catalog, incarnation, layout, resume, retention
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.posix import PosixTier
from spot_core.store.tier import Tier

# One tier's copy of a checkpoint: the tier's URL and the name.
Copy = tuple[str, CheckpointName]


def assert_run_invariants(
    local: Tier,
    remote: Tier,
    *,
    durable: CheckpointName | None = None,
    keep_remote: int = 1,
    damaged: Collection[Copy] = (),
) -> None:
    """What lies on the tiers keeps the promises.

    1. Every manifest can be read and all of its files verify on the same tier.
    2. Every manifest is of a claimed incarnation.
    3. A checkpoint that is on both tiers is the same on both.
    4. What the newest `keep_remote` checkpoints of the remote pin is on the remote.
    5. durable: the newest name that ever was durable on the remote; it, or a newer one, still is.
    6. The local tier's run.json and claims are the remote's.
    7. Every completion record can be read, and says the same on both tiers.

    damaged: copies that were damaged from outside. They are not looked into, and nothing is concluded from them.
    """
    here, there = _verified(local, damaged), _verified(remote, damaged)
    claimed = incarnation.newest(remote)
    for name in {*catalog.names(local), *catalog.names(remote)}:
        assert name.incarnation <= claimed, f"{name} is committed, but the newest claim is {claimed}"
    for name in here.keys() & there.keys():
        assert here[name] == there[name], f"{name} differs between {local.url} and {remote.url}"
    stored = catalog.names(remote)
    for name in stored[:keep_remote]:
        pin = there[name].pins if name in there else None
        assert pin is None or pin in stored, f"{name} pins {pin}, which is not in {remote.url}"
    if durable is not None:
        assert stored and stored[0] >= durable, f"{durable} was durable, the newest left is {stored[:1]}"
    _assert_same_records(local, remote)


def assert_resumes(local: PosixTier, remote: Tier, expected: CheckpointName | None) -> None:
    """A resume from these tiers would continue from `expected`, or start afresh if that is None.

    Resumes for real, on links to the local tier's files. Raises what the resume raises.
    """
    local.root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".judge-", dir=local.root.parent) as folder:
        trial = PosixTier(Path(folder) / local.root.name)
        if local.root.exists():
            shutil.copytree(local.root, trial.root, copy_function=os.link)
        restored = resume.newest_valid(trial, remote, lambda *_: None)
        found = restored.manifest.name if restored is not None else None
        assert found == expected, f"a resume finds {found}, it should find {expected}"
        if found is not None:
            resume.verify(trial, catalog.read_manifest(trial, found))


def assert_within_limits(
    local: PosixTier,
    remote: Tier,
    *,
    keep_local: int,
    keep_remote: int,
    keep_every: int | None = None,
) -> None:
    """Nothing is left that retention should have deleted. Holds after an upload, once nothing waits to be drained."""
    here, there = catalog.names(local), catalog.names(remote)
    newest = {*here[:keep_local], *there[:keep_remote]}
    pinned = _pins(local, newest) | _pins(remote, newest)
    milestones = retention.milestones({*here, *there}, every=keep_every)
    lasting = milestones | _pins(remote, milestones)
    for tier, left, kept in ((local, here[keep_local:], pinned), (remote, there[keep_remote:], pinned | lasting)):
        wrong = [str(name) for name in left if name not in kept]
        assert not wrong, f"{', '.join(wrong)} should not be in {tier.url} any more"


def assert_swept(tier: Tier, *, before_incarnation: int) -> None:
    """No life older than `before_incarnation` has left anything that is not part of a committed checkpoint."""
    committed = set(catalog.names(tier))
    for folder in (layout.CHECKPOINTS, layout.STAGING):
        for name in filter(None, map(CheckpointName.parse, tier.list(folder))):
            is_leftover = folder == layout.STAGING or name not in committed
            assert not is_leftover or name.incarnation >= before_incarnation, f"{tier.url}/{folder}/{name} is left over"
    for name in catalog.completions(tier):
        is_young = name.incarnation >= before_incarnation
        assert name in committed or is_young, f"{tier.url} says that training ended at {name}, which is gone"


def _verified(tier: Tier, damaged: Collection[Copy]) -> dict[CheckpointName, Manifest]:
    found = {}
    for name in catalog.names(tier):
        if (tier.url, name) not in damaged:
            manifest = catalog.read_manifest(tier, name)
            resume.verify(tier, manifest)
            found[name] = manifest
    return found


def _pins(tier: Tier, names: Collection[CheckpointName]) -> set[CheckpointName]:
    pins = (catalog.read_manifest(tier, name).pins for name in catalog.names(tier) if name in names)
    return {pin for pin in pins if pin is not None}


def _assert_same_records(local: Tier, remote: Tier) -> None:
    records = [f"{layout.INCARNATIONS}/{entry}" for entry in local.list(layout.INCARNATIONS)]
    for path in [layout.RUN, *records] if layout.RUN in local.list("") else records:
        assert local.read(path) == remote.read(path), f"{path} differs between {local.url} and {remote.url}"
    ended, there = catalog.completions(local), catalog.completions(remote)
    for tier, found in ((local, ended), (remote, there)):
        entries = [entry for entry in tier.list(layout.MANIFESTS) if layout.completed(entry) is not None]
        assert len(found) == len(entries), f"a completion record in {tier.url} cannot be read"
    for name in ended.keys() & there.keys():
        assert ended[name] == there[name], f"the end of training at {name} differs between the tiers"
