"""The drain: from the local to the remote tier, newest first, whatever fails, and nothing deleted too early."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from spot_core.agent.drain import Drain
from spot_core.errors import CommitConflictError, CorruptCheckpointError, TierError
from spot_core.store import incarnation, layout, resume, retention
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.store.remote import FsspecTier
from spot_core.store.tier import OnBytes, Tier
from spot_core.testing.checkpoints import commit_checkpoint
from spot_core.testing.faults import MOMENTS, Fault, FaultPlan, FaultyPosixTier, FaultyTier, SimulatedCrash, When
from spot_core.testing.invariants import assert_run_invariants
from tests.servers import S3Server
from tests.trees import tree

ONE, TWO, THREE, FOUR = (CheckpointName(1, step) for step in (10, 20, 30, 40))


@pytest.fixture
def local(tmp_path: Path) -> PosixTier:
    return PosixTier(tmp_path / "local")


@pytest.fixture
def remote(tmp_path: Path, local: PosixTier) -> PosixTier:
    """A remote on which life 1 was claimed."""
    remote = PosixTier(tmp_path / "remote")
    incarnation.claim(local, remote, 0.0)
    return remote


def make_drain(local: PosixTier, remote: Tier, *, keep_local: int = 2, keep_remote: int = 2) -> Drain:
    return Drain(local, remote, incarnation=1, keep_local=keep_local, keep_remote=keep_remote)


def drain_all(drain: Drain, *, patience: int = 0) -> list[CheckpointName]:
    """Names in the order they became durable; like the agent, tries again after up to `patience` failures."""
    drained = []
    while True:
        try:
            result = drain.step(lambda *_: None)
        except TierError:
            patience -= 1
            if patience < 0:
                raise
            continue
        if result is None:
            return drained
        drained.append(result[0])


# -- what is drained, in which order ---------------------------------------------------------------------------


def test_nothing_to_drain_is_no_work(local: PosixTier, remote: PosixTier) -> None:
    assert drain_all(make_drain(local, remote)) == []


def test_the_newest_is_drained_first(local: PosixTier, remote: PosixTier) -> None:
    for name in (ONE, TWO, THREE):
        commit_checkpoint(local, name)
    assert drain_all(make_drain(local, remote, keep_local=3, keep_remote=3)) == [THREE, TWO, ONE]
    assert resume.names(remote) == [THREE, TWO, ONE]
    assert_run_invariants(local, remote, durable=THREE)


def test_what_a_newer_one_made_worthless_is_not_uploaded(local: PosixTier, remote: PosixTier) -> None:
    for name in (ONE, TWO, THREE, FOUR):
        commit_checkpoint(local, name)
    plan = FaultPlan()
    assert drain_all(make_drain(local, FaultyTier(remote, plan), keep_remote=2)) == [FOUR, THREE]
    uploads = [line for line in plan.operations if "upload" in line]
    assert uploads and not [line for line in uploads if str(ONE) in line or str(TWO) in line]
    assert resume.names(local) == resume.names(remote) == [FOUR, THREE]


def test_what_is_on_the_remote_already_is_not_uploaded_again(local: PosixTier, remote: PosixTier) -> None:
    commit_checkpoint(local, ONE)
    drain_all(make_drain(local, remote))
    plan = FaultPlan()
    assert drain_all(make_drain(local, FaultyTier(remote, plan))) == []
    assert not [line for line in plan.operations if "upload" in line or "create" in line or "delete" in line]


def test_a_commit_made_during_the_drain_comes_next(local: PosixTier, remote: PosixTier) -> None:
    commit_checkpoint(local, ONE)
    commit_checkpoint(local, TWO)
    drain = make_drain(local, remote)
    assert drain.step(lambda *_: None) is not None
    commit_checkpoint(local, THREE)
    assert drain.pending() == [THREE]
    assert drain_all(drain) == [THREE]


def test_progress_starts_at_nothing_and_ends_at_all_of_it(local: PosixTier, remote: PosixTier) -> None:
    manifest = commit_checkpoint(local, ONE)
    seen: list[tuple[CheckpointName, int, int]] = []
    make_drain(local, remote).step(lambda *progress: seen.append(progress))
    assert seen[0] == (ONE, 0, manifest.total_bytes)
    assert max(done for _, done, _ in seen) == manifest.total_bytes


def test_the_end_of_training_is_drained_with_its_checkpoint(local: PosixTier, remote: PosixTier) -> None:
    drain = make_drain(local, remote)
    commit_checkpoint(local, ONE)
    drain_all(drain)
    assert resume.completions(remote) == {}
    commit_checkpoint(local, TWO)
    resume.mark_complete(local, TWO, 20)
    drain_all(drain)
    assert resume.completions(remote) == {TWO: 20}
    assert_run_invariants(local, remote, durable=TWO)


def test_the_end_of_training_is_not_told_before_its_checkpoint_is_durable(local: PosixTier, remote: PosixTier) -> None:
    commit_checkpoint(local, ONE)
    resume.mark_complete(local, ONE, 10)
    plan = FaultPlan()
    drain_all(make_drain(local, FaultyTier(remote, plan)))
    created = [line for line in plan.operations if "create" in line]
    assert created == [f"remote.create {layout.manifest(ONE)}", f"remote.create {layout.completion(ONE)}"]


# -- what is pinned --------------------------------------------------------------------------------------------


def test_the_pinned_one_is_durable_before_the_one_that_pins_it(local: PosixTier, remote: PosixTier) -> None:
    commit_checkpoint(local, ONE)
    commit_checkpoint(local, TWO)
    commit_checkpoint(local, THREE, pins=ONE)
    assert drain_all(make_drain(local, remote, keep_remote=1)) == [ONE, THREE]
    assert resume.names(remote) == [THREE, ONE]
    assert_run_invariants(local, remote, durable=THREE)


def test_the_pinned_one_survives_while_it_is_pinned(local: PosixTier, remote: PosixTier) -> None:
    drain = make_drain(local, remote, keep_local=1, keep_remote=1)
    commit_checkpoint(local, ONE)
    drain_all(drain)
    for step in (50, 60, 70):
        commit_checkpoint(local, CheckpointName(1, step), pins=ONE)
        drain_all(drain)
        assert resume.names(local) == resume.names(remote) == [CheckpointName(1, step), ONE]
        assert_run_invariants(local, remote, durable=CheckpointName(1, step))
    commit_checkpoint(local, CheckpointName(1, 80), pins=CheckpointName(1, 70))
    drain_all(drain)
    assert resume.names(local) == resume.names(remote) == [CheckpointName(1, 80), CheckpointName(1, 70)]


def test_what_a_commit_that_still_waits_pins_is_not_deleted_meanwhile(local: PosixTier, remote: PosixTier) -> None:
    drain = make_drain(local, remote, keep_local=1, keep_remote=1)
    commit_checkpoint(local, ONE)
    drain_all(drain)
    commit_checkpoint(local, TWO)

    def commit_another(name: CheckpointName, done: int, total: int) -> None:
        if done == total and THREE not in resume.names(local):
            commit_checkpoint(local, THREE, pins=ONE)

    drain.step(commit_another)
    assert ONE in resume.names(local) and ONE in resume.names(remote)
    assert drain_all(drain) == [THREE]
    assert_run_invariants(local, remote, durable=THREE)


def test_every_commit_that_still_waits_keeps_what_it_pins(local: PosixTier, remote: PosixTier) -> None:
    """The newest of them may turn out to be damaged; then the one before it is drained after all."""
    drain = make_drain(local, remote, keep_local=1, keep_remote=1)
    commit_checkpoint(local, ONE)
    drain_all(drain)
    commit_checkpoint(local, TWO)

    def commit_others(name: CheckpointName, done: int, total: int) -> None:
        if done == total and FOUR not in resume.names(local):
            commit_checkpoint(local, THREE, pins=ONE)
            commit_checkpoint(local, FOUR)

    drain.step(commit_others)
    assert ONE in resume.names(local)
    local.delete([layout.checkpoint(FOUR)])
    assert drain_all(drain) == [THREE]
    assert ONE in resume.names(remote)
    assert remote.list(layout.CHECKPOINTS) == [str(ONE), str(THREE)]


def test_a_backlog_keeps_what_it_pins(local: PosixTier, remote: PosixTier) -> None:
    drain = make_drain(local, remote, keep_local=1, keep_remote=2)
    commit_checkpoint(local, ONE)
    drain_all(drain)
    commit_checkpoint(local, TWO)
    drain_all(drain)
    commit_checkpoint(local, THREE, pins=ONE)
    commit_checkpoint(local, FOUR)
    uploaded: set[CheckpointName] = set()
    while drain.step(lambda name, *_: uploaded.add(name)) is not None:
        assert ONE in resume.names(remote)
    assert resume.names(remote) == [FOUR, THREE, ONE]
    assert uploaded == {THREE, FOUR}, "what was pinned had to be uploaded again"


def test_what_an_older_kept_one_pins_stays_on_the_remote_while_newer_ones_wait(
    local: PosixTier, remote: PosixTier
) -> None:
    """Were the newest durable one all that is left of the run, its best model would be gone."""
    drain = make_drain(local, remote, keep_local=1, keep_remote=2)
    commit_checkpoint(local, ONE)
    drain_all(drain)
    commit_checkpoint(local, TWO, pins=ONE)
    drain_all(drain)
    for step in (50, 60):
        commit_checkpoint(local, CheckpointName(1, step))
    commit_checkpoint(local, CheckpointName(1, 70), pins=CheckpointName(1, 50))
    while (result := drain.step(lambda *_: None)) is not None:
        assert_run_invariants(local, remote, durable=result[0])
        newest_two = resume.names(remote)[:2]
        for name in newest_two:
            pin = resume.read_manifest(remote, name).pins
            assert pin is None or pin in resume.names(remote), f"{name} lost {pin}"


# -- what may be deleted ---------------------------------------------------------------------------------------


def test_nothing_is_deleted_before_a_newer_one_is_durable(local: PosixTier, remote: PosixTier) -> None:
    plan = FaultPlan()
    drain = make_drain(FaultyPosixTier(local.root, plan), FaultyTier(remote, plan), keep_local=1, keep_remote=1)
    for name in (ONE, TWO, THREE):
        commit_checkpoint(local, name)
        drain_all(drain)
    deletions = [index for index, line in enumerate(plan.operations) if ".delete " in line]
    assert deletions
    for index in deletions:
        deleted = next(name for name in (ONE, TWO, THREE) if str(name) in plan.operations[index])
        newer = [name for name in (ONE, TWO, THREE) if name > deleted]
        assert any(f"remote.create {layout.manifest(name)}" in plan.operations[:index] for name in newer)


def test_while_the_remote_fails_nothing_is_deleted_anywhere(local: PosixTier, remote: PosixTier) -> None:
    commit_checkpoint(local, ONE)
    drain_all(make_drain(local, remote, keep_local=1, keep_remote=1))
    plan = FaultPlan(Fault(operation="upload", count=None))
    drain = make_drain(local, FaultyTier(remote, plan), keep_local=1, keep_remote=1)
    for name in (TWO, THREE, FOUR):
        commit_checkpoint(local, name)
        with pytest.raises(TierError):
            drain_all(drain, patience=3)
    assert resume.names(local) == [FOUR, THREE, TWO, ONE]
    assert resume.names(remote) == [ONE]
    assert_run_invariants(local, remote, durable=ONE)


def test_a_damaged_local_checkpoint_is_not_uploaded_and_is_told_once(
    local: PosixTier, remote: PosixTier, caplog: pytest.LogCaptureFixture
) -> None:
    commit_checkpoint(local, ONE)
    manifest = commit_checkpoint(local, TWO)
    local.replace(f"{layout.checkpoint(TWO)}/{manifest.files[0].path}", b"damaged")
    drain = make_drain(local, remote, keep_local=1, keep_remote=1)
    assert drain_all(drain) == [ONE]
    assert drain_all(drain) == []
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1 and str(TWO) in errors[0]
    assert resume.names(remote) == [ONE]
    assert ONE in resume.names(local)
    commit_checkpoint(local, THREE)
    assert drain_all(drain) == [THREE]
    assert resume.names(remote) == resume.names(local) == [THREE]


def test_bytes_that_change_on_the_way_are_not_committed(local: PosixTier, remote: PosixTier) -> None:
    class Corrupting(PosixTier):
        is_broken = True

        def upload(self, source: Path, path: str, on_bytes: OnBytes) -> None:
            super().upload(source, path, on_bytes)
            if self.is_broken and path.endswith("model.bin"):
                data = bytearray(self.read(path))
                data[5] ^= 1
                self.replace(path, bytes(data))

    broken = Corrupting(remote.root)
    commit_checkpoint(local, ONE)
    drain = make_drain(local, broken)
    with pytest.raises(CorruptCheckpointError):
        drain.step(lambda *_: None)
    assert resume.names(remote) == []
    broken.is_broken = False
    assert drain_all(drain) == [ONE]
    assert_run_invariants(local, remote, durable=ONE)


def test_a_name_that_another_writer_committed_is_left_as_it_is(local: PosixTier, remote: PosixTier) -> None:
    drain = make_drain(local, remote)
    assert drain_all(drain) == []
    commit_checkpoint(remote, ONE, files={"checkpoint-10/model.bin": b"another's"})
    before = tree(remote.root)
    commit_checkpoint(local, ONE)
    with pytest.raises(CommitConflictError):
        drain.step(lambda *_: None)
    assert drain_all(drain) == []
    assert tree(remote.root) == before


def _fill_with_other_runs(tier: Tier, names: tuple[str, ...]) -> None:
    for run in names:
        for path in (layout.checkpoint(ONE) + "/model.bin", layout.manifest(ONE), f"staging/{ONE}/x", "run.json"):
            tier.create(f"{run}/{path}", run.encode())


OTHER_RUNS = ("run2", "run-2", "ru", "run.bak")


def test_other_runs_in_the_same_folders_are_not_touched(tmp_path: Path) -> None:
    for root in ("local", "remote"):
        _fill_with_other_runs(PosixTier(tmp_path / root), OTHER_RUNS)
    others = [tmp_path / root / run for root in ("local", "remote") for run in OTHER_RUNS]
    before = [tree(folder) for folder in others]
    _live_a_full_life(PosixTier(tmp_path / "local" / "run"), PosixTier(tmp_path / "remote" / "run"))
    assert all(before)
    assert [tree(folder) for folder in others] == before


def test_other_runs_in_the_same_bucket_are_not_touched(s3_server: S3Server, tmp_path: Path) -> None:
    """On an object store a folder is a prefix, and `run` is a prefix of `run2`."""
    bucket = f"s3://{s3_server.new_bucket()}"
    whole = FsspecTier(f"{bucket}/team", s3_server.options)
    _fill_with_other_runs(whole, OTHER_RUNS)
    before = {path: whole._fs.cat_file(path) for path in whole._fs.find(whole._root)}
    _live_a_full_life(PosixTier(tmp_path / "local" / "run"), FsspecTier(f"{bucket}/team/run", s3_server.options))
    after = {path: whole._fs.cat_file(path) for path in whole._fs.find(whole._root)}
    assert len(before) == 4 * len(OTHER_RUNS)
    assert {path: after.get(path) for path in before} == before
    assert len(after) > len(before)


def _live_a_full_life(local: PosixTier, remote: Tier) -> None:
    """Commit, drain, prune; leave orphans; sweep them in a second life."""
    assert incarnation.claim(local, remote, 0.0) == 1
    drain = make_drain(local, remote, keep_local=1, keep_remote=1)
    for name in (ONE, TWO, THREE):
        commit_checkpoint(local, name)
        drain_all(drain)
    for tier in (local, remote):
        tier.create(f"{layout.checkpoint(FOUR)}/orphan", b"without a manifest")
    number = incarnation.claim(local, remote, 0.0)
    for tier in (local, remote):
        retention.sweep_orphans(tier, resume.names(tier), before_incarnation=number)
        assert tier.list(layout.CHECKPOINTS) == [str(THREE)]
    assert_run_invariants(local, remote, durable=THREE)


# -- faults ----------------------------------------------------------------------------------------------------


def test_a_remote_that_is_down_from_the_start_is_drained_to_when_it_returns(
    local: PosixTier, remote: PosixTier
) -> None:
    plan = FaultPlan(Fault(count=None))
    drain = make_drain(local, FaultyTier(remote, plan))
    commit_checkpoint(local, ONE)
    with pytest.raises(TierError):
        drain_all(drain, patience=5)
    assert resume.names(remote) == [] and len(plan.fired) > 5
    plan.repair()
    assert drain_all(drain) == [ONE]
    assert_run_invariants(local, remote, durable=ONE)


def test_a_lost_reply_to_the_manifest_does_not_upload_again(local: PosixTier, remote: PosixTier) -> None:
    plan = FaultPlan(Fault(operation="create", path=layout.MANIFESTS, when="after"))
    drain = make_drain(local, FaultyTier(remote, plan))
    manifest = commit_checkpoint(local, ONE)
    with pytest.raises(TierError):
        drain.step(lambda *_: None)
    assert plan.fired == [f"after remote.create {layout.manifest(ONE)}"]
    assert resume.names(remote) == [ONE]  # committed: from here on its files must not be written
    assert drain_all(drain) == [ONE]
    assert sum("upload" in line for line in plan.operations) == len(manifest.files)
    assert_run_invariants(local, remote, durable=ONE)


@dataclass
class History:
    """Life 1 with one durable checkpoint, and three that wait: the last pins the second and is the end of training.

    Made once and copied for each way it can go on.
    """

    folder: Path
    copies: int = 0

    def __post_init__(self) -> None:
        local, remote = self._tiers("original")
        incarnation.claim(local, remote, 0.0)
        commit_checkpoint(local, ONE)
        drain_all(make_drain(local, remote, keep_local=1, keep_remote=1))
        commit_checkpoint(local, TWO)
        commit_checkpoint(local, THREE)
        commit_checkpoint(local, FOUR, pins=TWO)
        resume.mark_complete(local, FOUR, 40)

    def _tiers(self, name: str) -> tuple[PosixTier, PosixTier]:
        return PosixTier(self.folder / name / "local"), PosixTier(self.folder / name / "remote")

    def copy(self) -> tuple[PosixTier, PosixTier]:
        self.copies += 1
        shutil.copytree(self.folder / "original", self.folder / str(self.copies))
        return self._tiers(str(self.copies))

    def moments(self) -> list[tuple[int, When]]:
        """Before and after each operation of an undisturbed drain, and in the middle of those that have one."""
        plan = FaultPlan()
        drain_all(faulty_drain(*self.copy(), plan))
        assert sum(".delete " in line for line in plan.operations) >= 6
        assert len(plan.operations) > 30
        has_middle = re.compile(r"\w+\.(upload|record|delete) ")  # the parallel ones come in any order
        return [
            (nth, when)
            for nth, operation in enumerate(plan.operations, start=1)
            for when in MOMENTS
            if when != "midway" or has_middle.match(operation)
        ]


@pytest.fixture
def history(memory_path: Path) -> History:
    return History(memory_path)


def faulty_drain(local: PosixTier, remote: PosixTier, plan: FaultPlan) -> Drain:
    return make_drain(FaultyPosixTier(local.root, plan), FaultyTier(remote, plan), keep_local=1, keep_remote=1)


def drain_into_crash(drain: Drain) -> CheckpointName:
    """The newest checkpoint that was known to be durable when the process died."""
    durable = ONE
    try:
        while (result := drain.step(lambda *_: None)) is not None:
            durable = max(durable, result[0])
    except SimulatedCrash:
        return durable
    raise AssertionError("it did not crash")


def assert_drained(local: PosixTier, remote: PosixTier) -> None:
    assert resume.names(remote) == [FOUR, TWO]
    assert resume.completions(remote) == {FOUR: 40}
    assert FOUR in resume.names(local)
    assert_run_invariants(local, remote, durable=FOUR)


def test_whichever_operation_fails_once_everything_is_drained_in_the_end(history: History) -> None:
    for nth, when in history.moments():
        plan = FaultPlan(Fault(first=nth, when=when))
        local, remote = history.copy()
        drain_all(faulty_drain(local, remote, plan), patience=1)
        assert len(plan.fired) == 1
        assert_drained(local, remote)


def test_however_many_operations_fail_in_a_row_everything_is_drained_in_the_end(history: History) -> None:
    for nth in range(1, history.moments()[-1][0] + 1, 3):
        plan = FaultPlan(Fault(first=nth, count=9, when="after"))
        local, remote = history.copy()
        drain_all(faulty_drain(local, remote, plan), patience=9)
        assert plan.fired
        assert_drained(local, remote)


def test_a_crash_at_any_operation_loses_nothing_and_the_next_life_finishes(history: History) -> None:
    for nth, when in history.moments():
        plan = FaultPlan.crash_at(nth, when)
        local, remote = history.copy()
        durable = drain_into_crash(faulty_drain(local, remote, plan))
        assert len(plan.fired) == 1

        assert_run_invariants(local, remote, durable=durable)
        assert FOUR in resume.names(local), plan.fired

        number = incarnation.claim(local, remote, 0.0)
        for tier in (local, remote):
            retention.sweep_orphans(tier, resume.names(tier), before_incarnation=number)
            committed = {str(name) for name in resume.names(tier)}
            assert set(tier.list(layout.CHECKPOINTS)) == committed, plan.fired
        assert_run_invariants(local, remote, durable=durable)

        drain_all(Drain(local, remote, incarnation=number, keep_local=1, keep_remote=1))
        assert_run_invariants(local, remote, durable=FOUR)
        assert {FOUR, TWO} <= set(resume.names(remote)), plan.fired
        assert resume.completions(remote) == {FOUR: 40}


def test_a_new_instance_restores_what_was_durable_after_a_crash_at_any_operation(
    history: History, memory_path: Path
) -> None:
    for nth in range(1, history.moments()[-1][0] + 1):
        plan = FaultPlan.crash_at(nth, "midway")
        local, remote = history.copy()
        with pytest.raises(SimulatedCrash):
            drain_all(faulty_drain(local, remote, plan))
        newest = resume.names(remote)[0]
        assert newest >= ONE
        restored = resume.newest_valid(PosixTier(memory_path / f"new-{nth}"), remote, lambda *_: None)
        assert restored is not None and restored.manifest.name == newest
