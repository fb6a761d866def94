"""Random histories of a run: saves, drains, crashes, outages, notices, new lives, pruning, damage, repair.

After each step the world is judged as a whole (`World.judge`): the invariants of `spot_core.testing.invariants`, and
that a resume from here and now would find exactly what it must.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import stamina
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from spot_core.agent import drain
from spot_core.errors import CommitConflictError, ConfigError, CorruptCheckpointError, FencedError, TierError
from spot_core.report import places, prune
from spot_core.report.draining import KEEP_ALL, HandDrain
from spot_core.report.repair import repair
from spot_core.store import catalog, incarnation, layout, resume
from spot_core.store.layout import CheckpointName
from spot_core.testing.checkpoints import commit_checkpoint, content_of
from spot_core.testing.faults import MOMENTS, Fault, FaultPlan, FaultyPosixTier, FaultyTier, SimulatedCrash
from spot_core.testing.invariants import assert_within_limits
from tests.durability.scale import times
from tests.durability.world import Interrupted, Limits, LivingJob, World
from tests.trees import tree

SHARDS = 4
HISTORIES = times(40, 1_000) // SHARDS
STEPS = 30
LONG_AFTER_S = 10_000.0

WHEN = st.sampled_from(MOMENTS)
CRASHES = st.builds(FaultPlan.crash_at, st.integers(1, 60), WHEN)
OUTAGES = st.builds(
    lambda first, count, when: FaultPlan(Fault(tier="remote", first=first, count=count, when=when)),
    st.integers(1, 25),
    st.integers(1, 12),
    WHEN,
)
LOST_REPLIES = st.builds(
    lambda operation, first: FaultPlan(Fault(tier="remote", operation=operation, first=first, when="after")),
    st.sampled_from(["create", "upload", "delete", "replace", "record"]),
    st.integers(1, 5),
)
LOCAL_ERRORS = st.builds(lambda first, when: FaultPlan(Fault(first=first, when=when)), st.integers(1, 5), WHEN)
# Most operations go well.
CALM = st.builds(FaultPlan)
PLANS = st.one_of(CALM, CALM, CRASHES, OUTAGES, LOST_REPLIES)
PATIENCE = 13
DAMAGES = st.sampled_from(["flip", "truncate", "lengthen", "remove"])


class Histories(RuleBasedStateMachine):
    """One run. Rules that need a job draw which: the newest one, or a stale one that does not know it yet."""

    base: Path

    @initialize(
        keep_local=st.integers(1, 2),
        keep_remote=st.integers(1, 3),
        keep_every=st.sampled_from([None, 3, 7]),
        is_harmed=st.booleans(),
    )
    def begin(self, keep_local: int, keep_remote: int, keep_every: int | None, is_harmed: bool) -> None:
        """is_harmed: whether damage comes from outside; histories without it are judged more strictly."""
        self.is_harmed = is_harmed
        folder = Path(tempfile.mkdtemp(dir=self.base))
        self.world = World(folder, Limits(keep_local, keep_remote, keep_every))
        self.world.open(self.world.here, FaultPlan())

    @property
    def trainers(self) -> list[LivingJob]:
        return [job for job in self.world.jobs if job.is_training]

    @property
    def agents(self) -> list[LivingJob]:
        return [job for job in self.world.jobs if job.drain is not None]

    # -- a trainer -----------------------------------------------------------------------------------------

    @precondition(lambda self: self.trainers)
    @rule(data=st.data(), steps=st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.booleans()), max_size=4))
    def train(self, data: st.DataObject, steps: list[tuple[int, bool, bool]]) -> None:
        """Some quiet minutes: saves, each drained at once or not."""
        job = self._draw(data, self.trainers)
        for gap, is_best, is_drained in steps:
            if job.is_training:
                self._save(job, gap, is_best, FaultPlan())
                self.world.judge()
            if is_drained and job.drain is not None:
                self._drain(job)
                self.world.judge()

    @precondition(lambda self: self.trainers)
    @rule(data=st.data(), gap=st.integers(1, 4), is_best=st.booleans(), plan=st.one_of(CALM, CRASHES, LOCAL_ERRORS))
    def save(self, data: st.DataObject, gap: int, is_best: bool, plan: FaultPlan) -> None:
        self._save(self._draw(data, self.trainers), gap, is_best, plan)

    def _save(self, job: LivingJob, gap: int, is_best: bool, plan: FaultPlan) -> None:
        world = self.world
        world.acting = job.local
        job.step += gap
        name = CheckpointName(job.number, job.step)
        pins = None if is_best else job.best
        tier = FaultyPosixTier(job.local.root, plan)
        try:
            incarnation.check_fence(tier, job.number)
            commit_checkpoint(tier, name, pins=pins, created=world.clock)
            job.best = pins or name
        except FencedError:
            assert incarnation.newest(job.local) > job.number
            job.is_training = False
        except SimulatedCrash:
            job.is_training = False
        except TierError:
            shutil.rmtree(job.local.path(f"{layout.STAGING}/{name}"), ignore_errors=True)
        if incarnation.newest(job.local) > job.number:
            assert name not in catalog.names(job.local), "a fenced life committed"

    @precondition(lambda self: self.trainers)
    @rule(data=st.data(), is_agent_killed=st.booleans())
    def kill_the_trainer(self, data: st.DataObject, is_agent_killed: bool) -> None:
        job = self._draw(data, self.trainers)
        job.is_training = False
        if is_agent_killed:
            job.drain = None

    @precondition(lambda self: self.trainers)
    @rule(data=st.data())
    def end_the_training(self, data: st.DataObject) -> None:
        job = self._draw(data, self.trainers)
        if CheckpointName(job.number, job.step) in catalog.names(job.local):
            self.world.acting = job.local
            job.is_training = False
            catalog.mark_complete(job.local, CheckpointName(job.number, job.step), job.step)

    @precondition(lambda self: self.trainers)
    @rule(data=st.data(), budget=st.integers(0, 80), gap=st.integers(1, 3), is_best=st.booleans())
    def get_a_notice(self, data: st.DataObject, budget: int, gap: int, is_best: bool) -> None:
        """One more checkpoint, then as many operations as the grace period allows."""
        job = self._draw(data, self.trainers)
        self._save(job, gap, is_best, FaultPlan())
        self.world.judge()
        job.is_training = False
        if job.drain is not None:
            self._drain(job, Fault(first=budget + 1, error=SimulatedCrash))
        job.drain = None

    # -- an agent ------------------------------------------------------------------------------------------

    @precondition(lambda self: self.agents)
    @rule(data=st.data(), plan=PLANS, is_all=st.booleans())
    def drain(self, data: st.DataObject, plan: FaultPlan, is_all: bool) -> None:
        self._drain(self._draw(data, self.agents), *plan.faults, most=KEEP_ALL if is_all else 1)

    def _drain(self, job: LivingJob, *faults: Fault, most: int = KEEP_ALL) -> None:
        """Drain up to `most` checkpoints as the agent does, trying again after failures."""
        world, drain = self.world, job.drain
        assert drain is not None
        world.acting = job.local
        is_stale = world.is_stale(job)
        before = tree(world.remote.root) if is_stale else {}
        job.plan.repair()
        job.plan.add(*faults)
        uploads, failures = 0, 0
        try:
            while uploads < most and failures < PATIENCE:
                try:
                    if drain.step(lambda *_: None) is None:
                        self._drained(job, uploads)
                        break
                    uploads += 1
                except TierError:
                    failures += 1
                except CommitConflictError:
                    assert world.hurt, "nothing was damaged, and yet two contents under one name"
                    failures += 1
        except FencedError:
            assert is_stale, "the newest life was fenced"
            job.drain, job.is_training = None, False
        except SimulatedCrash:
            job.drain = None
        assert not is_stale or tree(world.remote.root) == before, "a stale life wrote to the remote"

    def _drained(self, job: LivingJob, uploads: int) -> None:
        """Nothing is left to drain: everything is durable that should be, and nothing else is kept."""
        world, limits = self.world, self.world.limits
        if world.is_stale(job):
            return
        newest = max(world.sound(job.local), default=None)
        if newest is not None and newest not in world.ever_hurt:
            there = max(catalog.names(world.remote), default=None)
            assert there is not None and there >= newest, f"{newest} is not durable"
        if uploads and not world.ever_hurt and not job.plan.fired:
            assert_within_limits(
                job.local,
                world.remote,
                keep_local=limits.keep_local,
                keep_remote=limits.keep_remote,
                keep_every=limits.keep_every,
            )

    @precondition(lambda self: self.agents)
    @rule(data=st.data())
    def kill_the_agent(self, data: st.DataObject) -> None:
        self._draw(data, self.agents).drain = None

    @precondition(lambda self: any(job.drain is None for job in self.trainers))
    @rule(data=st.data())
    def start_the_agent_again(self, data: st.DataObject) -> None:
        self.world.start_agent(self._draw(data, [job for job in self.trainers if job.drain is None]))

    @precondition(lambda self: self.world.jobs[-1].drain is None and layout.RUN in self.world.here.list(""))
    @rule(plan=PLANS)
    def drain_by_hand(self, plan: FaultPlan) -> None:
        world = self.world
        world.acting = world.here
        local, remote = FaultyPosixTier(world.here.root, plan), FaultyTier(world.remote, plan)
        refused: tuple[type[BaseException], ...] = (TierError, FencedError, SimulatedCrash, CorruptCheckpointError)
        if world.hurt:
            refused = (*refused, CommitConflictError)
        with contextlib.suppress(*refused):
            HandDrain(local, remote, KEEP_ALL, KEEP_ALL).once()

    # -- a new life ----------------------------------------------------------------------------------------

    @rule(data=st.data(), is_new_instance=st.booleans(), plan=PLANS)
    def start(self, data: st.DataObject, is_new_instance: bool, plan: FaultPlan) -> None:
        """The job is started again, whether or not the old one is gone."""
        world = self.world
        local = world.new_instance() if is_new_instance else data.draw(st.sampled_from(world.instances[-2:]))
        expected = world.newest_sound(local)
        before = incarnation.newest(world.remote)
        if expected is None and {*catalog.names(local), *catalog.names(world.remote)}:
            with pytest.raises(CorruptCheckpointError, match="Nothing was deleted"):
                world.open(local, FaultPlan())
            assert incarnation.newest(world.remote) == before, "a life that could not resume claimed a number"
            world.heal()
            world.here = local
            return
        world.here = local
        try:
            job = world.open(local, plan)
        except SimulatedCrash:
            return
        assert job.number > before
        assert job.step == (expected.step if expected else 0)
        world.forget_mended()
        assert expected is None or expected in world.sound(local), "what it resumed from is not whole here"

    @precondition(lambda self: self.world.jobs[-1].drain is not None)
    @rule(nth=st.integers(1, 40))
    def start_elsewhere_while_the_agent_drains(self, nth: int) -> None:
        """In the middle of an opening the agent of the life before commits and deletes what it still can."""
        world, old = self.world, self.world.jobs[-1]
        local = world.new_instance()
        if catalog.names(world.remote) and not world.sound(world.remote):
            return  # there is nothing to resume from elsewhere

        def drain() -> None:
            self._drain(old)
            world.judge()

        world.open(local, Interrupted(nth, drain))

    @precondition(lambda self: self.world.jobs[-1].drain is not None)
    @rule(nth=st.integers(1, 60))
    def drain_while_a_new_life_starts_elsewhere(self, nth: int) -> None:
        """The new life's claim comes between two operations of an upload."""
        world, old = self.world, self.world.jobs[-1]
        opened: list[LivingJob] = []
        local = world.new_instance()
        if catalog.names(world.remote) and not world.sound(world.remote):
            return
        world.start_agent(old, Interrupted(nth, lambda: opened.append(world.open(local, FaultPlan()))))
        world.acting = old.local
        assert old.drain is not None
        with contextlib.suppress(FencedError):
            for _ in range(PATIENCE):
                try:
                    if old.drain.step(lambda *_: None) is None:
                        break
                except TierError:
                    assert opened, "only a new life could sweep what is being uploaded"
                except CommitConflictError:
                    assert world.hurt
        world.acting = old.local
        world.start_agent(old)
        assert not opened or world.is_stale(old)

    # -- by hand -------------------------------------------------------------------------------------------

    @rule(data=st.data(), plan=st.one_of(CALM, CALM, CRASHES, OUTAGES), is_stopped=st.booleans())
    def prune(self, data: st.DataObject, plan: FaultPlan, is_stopped: bool) -> None:
        """By hand, to as many as the run keeps or fewer. is_stopped: the job was stopped for it, as it must be."""
        world, limits = self.world, self.world.limits
        if is_stopped:
            world.jobs[-1].drain, world.jobs[-1].is_training = None, False
        world.keep_remote = keep = data.draw(st.integers(1, limits.keep_remote))
        is_active = world.jobs[-1].drain is not None
        before = tree(world.remote.root)
        tier = FaultyTier(world.remote, plan)
        now = world.clock if is_active else world.clock + LONG_AFTER_S
        world.acting, world.is_pruned_by_hand = world.here, True
        try:
            found = prune.plan(tier, keep=keep, keep_every=limits.keep_every, now=now, on_progress=lambda *_: None)
            prune.execute(tier, found)
        except ConfigError:
            assert is_active and tree(world.remote.root) == before
        except CorruptCheckpointError:
            assert {url for url, _ in world.hurt} & {world.remote.url}, "nothing there was damaged"
            assert tree(world.remote.root) == before
        except (SimulatedCrash, TierError):
            assert plan.fired

    @precondition(lambda self: self.world.hurt)
    @rule(is_remote=st.booleans(), plan=st.one_of(CALM, CALM, CRASHES, OUTAGES))
    def mend(self, is_remote: bool, plan: FaultPlan) -> None:
        """Everything is stopped, and the operator repairs one tier from the other."""
        world = self.world
        if layout.RUN not in world.here.list(""):
            return
        for job in world.jobs:
            job.drain, job.is_training = None, False
        target, source = (world.remote, world.here) if is_remote else (world.here, world.remote)
        world.acting = world.here
        bad = {name for url, name in world.hurt if url == target.url}
        healthy = world.sound(source)
        try:
            result = repair(
                world.stored(FaultyTier(target, plan)),
                world.stored(FaultyTier(source, plan, name="source")),
                now=world.clock + LONG_AFTER_S,
                on_progress=lambda *_: None,
            )
        except (SimulatedCrash, TierError):
            assert plan.fired
            return
        if not plan.fired:
            lost = {name for url, name in world.lost if url == target.url}
            unmended = {each.name for each in result.damaged if each.error is not None}
            assert bad <= {each.name for each in result.damaged} <= bad | lost, f"{bad} was damaged: {result.damaged}"
            assert unmended & bad == bad - healthy, f"{healthy} was whole elsewhere: {result.damaged}"

    @precondition(lambda self: self.is_harmed)
    @rule(data=st.data(), kind=DAMAGES, is_manifest=st.booleans(), is_remote=st.booleans())
    def damage(self, data: st.DataObject, kind: str, is_manifest: bool, is_remote: bool) -> None:
        """Something from outside, where another copy or an older checkpoint is left."""
        world = self.world
        tier, other = (world.remote, world.here) if is_remote else (world.here, world.remote)
        left = world.sound(other)
        sound = sorted(world.sound(tier))
        if sound and (left or len(sound) > 1):
            name = self._draw(data, sound)
            path = "" if is_manifest else data.draw(st.sampled_from(sorted(content_of(name))))
            world.damage(tier, name, kind, path)

    # -- after each step -----------------------------------------------------------------------------------

    @invariant()
    def the_world_is_sound(self) -> None:
        self.world.clock += 1.0
        self.world.judge()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self._end_well()
            self.world.close()

    def _end_well(self) -> None:
        """Whatever happened: a new life resumes, commits, drains; another one elsewhere finds that."""
        world = self.world
        world.heal()
        world.open(world.here, FaultPlan())
        job = world.jobs[-1]
        world.judge()
        self._save(job, 1, True, FaultPlan())
        world.judge()
        self._drain(job)
        world.judge()
        name = CheckpointName(job.number, job.step)
        assert world.newest_sound(world.new_instance()) == name
        assert world.open(world.instances[-1], FaultPlan()).step == name.step
        world.judge()

    @staticmethod
    def _draw(data: st.DataObject, candidates: list[Any]) -> Any:
        """One of them, the last one more often."""
        return data.draw(st.sampled_from([candidates[-1], *candidates]))


@pytest.fixture
def base(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in memory. Pools have one thread, so that the nth operation is the same when a history is replayed."""
    for module in (drain, catalog, resume, places):
        monkeypatch.setattr(module, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))
    with stamina.set_testing(True, attempts=40):
        yield memory_path


@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_whatever_happens_nothing_is_lost_and_the_run_goes_on(base: Path, shard: int) -> None:
    class OfThisTest(Histories):
        pass

    OfThisTest.base = base
    run_state_machine_as_test(
        OfThisTest,
        settings=settings(
            max_examples=HISTORIES,
            stateful_step_count=STEPS,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_an_old_life_does_not_record_the_end_of_training(base: Path) -> None:
    """Found by the histories: a relaunch would take the run for finished."""
    world = World(base / "world", Limits(keep_local=1, keep_remote=1, keep_every=None))
    old = world.open(world.here, FaultPlan())
    commit_checkpoint(old.local, CheckpointName(old.number, 10))
    assert old.drain is not None and old.drain.step(lambda *_: None) is not None
    catalog.mark_complete(old.local, CheckpointName(old.number, 10), 10)
    world.open(world.new_instance(), FaultPlan())
    with pytest.raises(FencedError):
        old.drain.step(lambda *_: None)
    assert catalog.completions(world.remote) == {}
