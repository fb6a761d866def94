"""The world of a random history: a bucket, instances with local disks, lives, and what is known to be true of them.

The parts are the real ones: files, claims, commits, drains, resumes. What is known beside them is little: the bytes
that were committed under each name, which copies were damaged from outside, and what was durable at some time.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import shutil
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

from spot_core.agent import lives, opening
from spot_core.agent.drain import Drain
from spot_core.agent.lives import Life
from spot_core.agent.opening import Opened
from spot_core.errors import CorruptCheckpointError, SpotError
from spot_core.report.places import StoredRun
from spot_core.store import catalog, incarnation, layout, retention
from spot_core.store.identity import read_run
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.store.tier import Tier
from spot_core.testing.checkpoints import RUN, commit_checkpoint, content_of
from spot_core.testing.faults import FaultPlan, FaultyPosixTier, FaultyTier
from spot_core.testing.invariants import Copy, assert_resumes, assert_run_invariants, assert_swept
from tests.opening import IDENTITY, open_run
from tests.trees import tree

logger = logging.getLogger(__name__)

NEIGHBOUR = f"{RUN}2"

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Limits:
    """What retention keeps."""

    keep_local: int
    keep_remote: int
    keep_every: int | None


@dataclass(slots=True)
class LivingJob:
    """A life: a trainer, and an agent while there is one. best: what a checkpoint that is no better pins."""

    number: int
    local: PosixTier
    step: int
    best: CheckpointName | None
    is_training: bool = True
    plan: FaultPlan = field(default_factory=FaultPlan, repr=False)
    drain: Drain | None = None


class Interrupted(FaultPlan):
    """No fault, but something else happens right before the nth operation. All others wait until it has: of a claim
    that another thread makes meanwhile nobody could tell which came first."""

    def __init__(self, nth: int, action: Callable[[], None]) -> None:
        super().__init__()
        self._left, self._action, self._turn = nth, action, threading.RLock()

    def run(
        self, tier: str, operation: str, path: str, action: Callable[[], _T], midway: Callable[[], None] | None = None
    ) -> _T:
        with self._turn:
            self._left -= 1
            if self._left == 0:
                self._action()
            return super().run(tier, operation, path, action, midway)


class World:
    """Everything there is, with the judge of it. here: the local tier of the instance that was started last."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder, self.limits = folder, limits
        self.keep_remote = limits.keep_remote  # until the next look
        self.is_pruned_by_hand = False  # since the last look: from the remote alone, without what lies here
        self.remote = PosixTier(folder / "bucket" / RUN)
        self.instances: list[PosixTier] = []
        self.jobs: list[LivingJob] = []
        self.here = self.new_instance()
        self.acting = self.here
        self.clock = 1_000.0
        self.committed: dict[CheckpointName, bytes] = {}  # manifests, as they were committed
        self.saved: dict[str, set[CheckpointName]] = {}  # on which instance
        self.durable: set[CheckpointName] = set()  # at some time
        self.hurt: set[Copy] = set()
        self.ever_hurt: set[CheckpointName] = set()
        self.lost: set[Copy] = set()  # their manifests were removed
        self._seen: dict[str, list[CheckpointName]] = {}
        commit_checkpoint(PosixTier(folder / "bucket" / NEIGHBOUR), CheckpointName(1, 1))
        commit_checkpoint(PosixTier(folder / "nvme0" / NEIGHBOUR), CheckpointName(1, 1))
        self._neighbours = self._neighbour_files()

    # -- acting --------------------------------------------------------------------------------------------

    def new_instance(self) -> PosixTier:
        self.instances.append(PosixTier(self.folder / f"nvme{len(self.instances)}" / RUN))
        return self.instances[-1]

    def open(self, local: PosixTier, plan: FaultPlan) -> LivingJob:
        """A new life on an instance. Raises what opening raises."""
        self.acting = local
        tiers = FaultyPosixTier(local.root, plan), FaultyTier(self.remote, plan)
        opened = open_run(*tiers, started=self.clock)
        number = opened.incarnation
        if number is None:
            assert opened.restored is not None and opened.restored.manifest.name in catalog.completions(self.remote) | (
                catalog.completions(local)
            )
            number = opening.claim(*tiers, IDENTITY, started=self.clock, timeout_s=60.0)
        else:
            assert_swept(local, before_incarnation=number)
            with contextlib.suppress(SpotError):  # as the agent does: the next life will
                opening.sweep_remote(tiers[1], number)
                assert_swept(self.remote, before_incarnation=number - 1)
        job = self._job(opened, local, number)
        self._record(job, lives.RUNNING)
        return job

    def _job(self, opened: Opened, local: PosixTier, number: int) -> LivingJob:
        point = opened.restored.manifest if opened.restored else None
        job = LivingJob(number, local, point.step if point else 0, opened.pin or (point.name if point else None))
        self.start_agent(job)
        self.jobs.append(job)
        self.here = local
        return job

    def start_agent(self, job: LivingJob, plan: FaultPlan | None = None) -> None:
        job.plan = plan or FaultPlan()
        tiers = FaultyPosixTier(job.local.root, job.plan), FaultyTier(self.remote, job.plan)
        limits = self.limits
        job.drain = Drain(
            *tiers,
            incarnation=job.number,
            keep_local=limits.keep_local,
            keep_remote=limits.keep_remote,
            keep_every=limits.keep_every,
        )

    def _record(self, job: LivingJob, outcome: str) -> None:
        life = Life(
            incarnation=job.number,
            host=platform.node(),
            boot_id=str(job.local.root),
            started=self.clock,
            heartbeat=self.clock,
            outcome=outcome,
        )
        self.remote.replace(layout.life(job.number), life.to_json())

    def stored(self, tier: Tier) -> StoredRun:
        identity = read_run(tier)
        assert identity is not None
        return StoredRun(tier, identity)

    def damage(self, tier: PosixTier, name: CheckpointName, kind: str, path: str) -> None:
        """kind: flip, truncate, lengthen or remove, of one file (or the manifest, where `path` is empty)."""
        file = tier.path(f"{layout.checkpoint(name)}/{path}" if path else layout.manifest(name))
        data = bytearray(file.read_bytes())
        self.ever_hurt.add(name)
        if kind == "remove":
            file.unlink()
            if not path:
                self.hurt.discard((tier.url, name))
                self.lost.add((tier.url, name))
                self._seen[tier.url].remove(name)
                return
        elif kind == "truncate" and data:
            file.write_bytes(data[: len(data) // 2])
        elif kind == "flip" and data:
            data[len(data) // 2] ^= 0x41
            file.write_bytes(data)
        else:
            file.write_bytes(data + b"\0")
        self.hurt.add((tier.url, name))

    def heal(self) -> None:
        """The operator brings back every damaged copy from elsewhere."""
        for url, name in sorted(self.hurt):
            tier = PosixTier(url)
            for path, content in content_of(name).items():
                tier.replace(f"{layout.checkpoint(name)}/{path}", content)
            tier.replace(layout.manifest(name), self.committed[name])
        self.hurt.clear()

    # -- judging -------------------------------------------------------------------------------------------

    def sound(self, tier: PosixTier) -> set[CheckpointName]:
        """Names on a tier whose copy there was not damaged."""
        return {name for name in catalog.names(tier) if (tier.url, name) not in self.hurt}

    def newest_sound(self, local: PosixTier) -> CheckpointName | None:
        """What a resume on that instance must find, None if nothing is whole."""
        return max(self.sound(local) | self.sound(self.remote), default=None)

    def is_stale(self, job: LivingJob) -> bool:
        return incarnation.newest(self.remote) > job.number

    def judge(self) -> None:
        """Everything that must hold now, whatever was done since the last time."""
        for local in self.instances:
            for name in set(catalog.names(local)) - self.committed.keys():
                self._note_commit(local, name)
        self.durable.update(catalog.names(self.remote))
        self.forget_mended()
        self._check_deletions()
        for local in {self.here.url: self.here, self.acting.url: self.acting}.values():
            keep = 0 if self.ever_hurt else self.limits.keep_remote  # what was pinned may be what was hurt
            assert_run_invariants(local, self.remote, keep_remote=keep, damaged=self.hurt)
        for tier in (self.remote, *self.instances):
            for name in self.sound(tier):
                assert tier.read(layout.manifest(name)) == self.committed[name]
        self._check_resume(self.here)
        assert self._neighbour_files() == self._neighbours, "another run's files changed"

    def _note_commit(self, local: PosixTier, name: CheckpointName) -> None:
        for path, content in content_of(name).items():
            assert local.read(f"{layout.checkpoint(name)}/{path}") == content
        self.committed[name] = local.read(layout.manifest(name))
        self.saved.setdefault(local.url, set()).add(name)

    def forget_mended(self) -> None:
        """Copies that hold the bytes of their commit again are no longer known as damaged."""
        for url, name in list(self.hurt):
            tier = PosixTier(url)
            files = {layout.manifest(name): self.committed[name]}
            files |= {f"{layout.checkpoint(name)}/{path}": content for path, content in content_of(name).items()}
            is_gone = not tier.path(layout.manifest(name)).exists()
            if is_gone or all(tier.path(p).is_file() and tier.read(p) == content for p, content in files.items()):
                self.hurt.discard((url, name))

    def _check_resume(self, local: PosixTier) -> None:
        expected = self.newest_sound(local)
        known = self.durable | self.saved.get(local.url, set())
        newest = max(known, default=None)
        if newest is not None and newest not in self.ever_hurt:
            assert expected == newest, f"{newest} was committed, the newest that is whole is {expected}"
        if expected is None and {*catalog.names(local), *catalog.names(self.remote)}:
            with pytest.raises(CorruptCheckpointError, match="Nothing was deleted"):
                assert_resumes(local, self.remote, expected)
        else:
            assert_resumes(local, self.remote, expected)

    def _check_deletions(self) -> None:
        """What is gone since the last look was superseded, whoever deleted it."""
        names = {tier.url: catalog.names(tier) for tier in (self.remote, *self.instances)}
        before_there = self._seen.get(self.remote.url, [])
        there = sorted({*before_there, *names[self.remote.url]}, reverse=True)
        before_here = self._seen.get(self.acting.url, [])
        here = sorted({*before_here, *names[self.acting.url]}, reverse=True)
        milestones = retention.milestones({*here, *there}, every=self.limits.keep_every)
        kept_there = {*there[: self.keep_remote], *milestones}
        kept_here = {*here[: self.limits.keep_local]}
        pinned = self._pinned(kept_there | kept_here)
        pinned_there = pinned
        if self.is_pruned_by_hand:
            kept_there = {*there[: self.keep_remote], *retention.milestones(there, every=self.limits.keep_every)}
            pinned_there = self._pinned(kept_there)
        newest = max(self.durable, default=None)
        for name in set(before_there) - set(names[self.remote.url]):
            assert newest is not None and name < newest, f"{name} is gone from the remote, nothing newer is durable"
            assert name not in kept_there | pinned_there, f"{name} is gone from the remote, it was to be kept"
        waits = {*sorted({*here, *there}, reverse=True)[: self.keep_remote], *milestones}
        for name in set(before_here) - set(names[self.acting.url]):
            assert newest is not None and name < newest, f"{name} is gone here, nothing newer is durable"
            assert name not in kept_here, f"{name} is gone here, it was to be kept"
            is_wanted = name in pinned | waits and name not in self.ever_hurt | self.durable
            assert not is_wanted, f"{name} is gone here, it was to be drained"
        for tier in self.instances:
            if tier.url != self.acting.url:
                gone = set(self._seen.get(tier.url, ())) - set(names[tier.url])
                assert not gone, f"{gone} is gone from an instance where nothing was done"
        self._seen, self.keep_remote, self.is_pruned_by_hand = names, self.limits.keep_remote, False

    def _pinned(self, names: Collection[CheckpointName]) -> set[CheckpointName]:
        tiers = (self.remote, self.acting)
        manifests = [
            catalog.read_manifest(tier, name)
            for name in names
            if name not in self.ever_hurt
            for tier in tiers
            if name in catalog.names(tier)
        ]
        return {manifest.pins for manifest in manifests if manifest.pins is not None}

    def _neighbour_files(self) -> dict[str, dict[str, bytes | None]]:
        return {str(place): tree(place) for place in (self.folder / part / NEIGHBOUR for part in ("bucket", "nvme0"))}

    def close(self) -> None:
        shutil.rmtree(self.folder)
