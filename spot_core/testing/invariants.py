"""What must hold on the two tiers of a run after any history of commits, drains, crashes and deletions."""

from __future__ import annotations

from spot_core.store import incarnation, resume
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.tier import Tier


def assert_run_invariants(local: Tier, remote: Tier, *, durable: CheckpointName | None = None) -> None:
    """Raise AssertionError unless what lies on the tiers keeps the promises; changes nothing.

    1. Every manifest can be read and all of its files verify on the same tier.
    2. Every manifest is of a claimed incarnation.
    3. A checkpoint that is on both tiers is the same on both.
    4. What the newest checkpoint of the remote pins is on the remote.
    5. durable: the newest name that ever was durable on the remote; it, or a newer one, still is.
    """
    here, there = _verified(local), _verified(remote)
    claimed = incarnation.newest(remote)
    for name in here.keys() | there.keys():
        assert name.incarnation <= claimed, f"{name} is committed, but the newest claim is {claimed}"
    for name in here.keys() & there.keys():
        assert here[name] == there[name], f"{name} differs between {local.url} and {remote.url}"
    newest = max(there, default=None)
    if newest is not None:
        pin = there[newest].pins
        assert pin is None or pin in there, f"{newest} pins {pin}, which is not in {remote.url}"
    if durable is not None:
        assert newest is not None and newest >= durable, f"{durable} was durable, the newest left is {newest}"


def _verified(tier: Tier) -> dict[CheckpointName, Manifest]:
    found = {}
    for name in resume.names(tier):
        manifest = resume.read_manifest(tier, name)
        resume.verify(tier, manifest)
        found[name] = manifest
    return found
