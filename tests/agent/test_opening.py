"""Opening a run: checked, restored, claimed; whatever fails or dies meanwhile, it can be opened again."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

from spot_core.agent import opening
from spot_core.agent.lives import Life
from spot_core.agent.opening import Opened
from spot_core.errors import CommitUnknownError, ConfigError, TierDeniedError, TierError
from spot_core.store import catalog, incarnation, layout
from spot_core.store import identity as identities
from spot_core.store.identity import RunIdentity, read_run
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.store.remote import FsspecTier
from spot_core.testing.checkpoints import commit_checkpoint
from spot_core.testing.faults import Fault, FaultPlan, FaultyPosixTier, FaultyTier, SimulatedCrash
from spot_core.testing.invariants import assert_run_invariants
from tests.opening import IDENTITY, open_run
from tests.servers import OverwritingS3Server

ONE, TWO = CheckpointName(1, 10), CheckpointName(1, 20)

pytestmark = pytest.mark.usefixtures("without_waiting")


@pytest.fixture
def local(memory_path: Path) -> PosixTier:
    return PosixTier(memory_path / "local")


@pytest.fixture
def remote(memory_path: Path) -> PosixTier:
    return PosixTier(memory_path / "remote")


def test_the_first_life_of_a_run_starts_afresh(local: PosixTier, remote: PosixTier) -> None:
    opened = open_run(local, remote)
    assert (opened.incarnation, opened.restored, opened.pin, opened.lives) == (1, None, None, [])
    assert read_run(local) == read_run(remote) is not None


def test_racing_first_lives_agree_on_one_run(remote: PosixTier, memory_path: Path) -> None:
    start = threading.Barrier(6)

    def first_life(number: int) -> tuple[int | None, object]:
        local = PosixTier(memory_path / f"instance-{number}")
        start.wait()
        return open_run(local, remote).incarnation, read_run(local)

    with ThreadPoolExecutor(6) as pool:
        lives = list(pool.map(first_life, range(6)))
    assert sorted(number for number, _ in lives if number) == [1, 2, 3, 4, 5, 6]
    assert [run for _, run in lives] == [read_run(remote)] * 6


def test_racing_first_lives_of_different_runs_are_not_mixed(remote: PosixTier, memory_path: Path) -> None:
    start = threading.Barrier(6)

    def first_life(number: int) -> bool:
        local, identity = PosixTier(memory_path / f"instance-{number}"), RunIdentity("testing", {"batch": number})
        start.wait()
        try:
            return open_run(local, remote, identity=identity).incarnation is not None
        except ConfigError:
            assert local.list("") == []
            return False

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(first_life, range(6))) == 1


def test_the_newest_is_restored_with_what_it_pins(local: PosixTier, remote: PosixTier) -> None:
    open_run(local, remote)
    commit_checkpoint(remote, ONE)
    commit_checkpoint(remote, TWO, pins=ONE)
    opened = open_run(local, remote)
    assert opened.restored is not None
    assert (opened.incarnation, opened.restored.manifest.name, opened.pin) == (2, TWO, ONE)
    assert catalog.names(local) == [TWO, ONE]
    assert_run_invariants(local, remote, durable=TWO)


@pytest.mark.parametrize("is_there", [True, False], ids=["damaged", "missing"])
def test_a_lost_pin_is_told_and_does_not_stop_the_run(
    local: PosixTier, remote: PosixTier, is_there: bool, caplog: pytest.LogCaptureFixture
) -> None:
    open_run(local, remote)
    if is_there:
        commit_checkpoint(remote, ONE)
        remote.delete([layout.checkpoint(ONE)])
    commit_checkpoint(remote, TWO, pins=ONE)
    opened = open_run(local, remote)
    assert opened.restored is not None and (opened.restored.manifest.name, opened.pin) == (TWO, None)
    told = [record.getMessage() for record in caplog.records if "best model" in record.getMessage()]
    assert len(told) == 1 and str(ONE) in told[0] and "None" not in told[0]


def test_what_the_life_before_commits_until_the_claim_is_not_left_behind(local: PosixTier, remote: PosixTier) -> None:
    open_run(local, remote)
    commit_checkpoint(local, ONE)

    class CommittingMeanwhile(PosixTier):
        def create(self, path: str, data: bytes) -> None:
            if path == layout.incarnation(2):
                commit_checkpoint(PosixTier(self.root), TWO)
            super().create(path, data)

    opened = open_run(local, CommittingMeanwhile(remote.root))
    assert opened.restored is not None and opened.restored.manifest.name == TWO


def test_of_many_checkpoints_only_the_newest_are_listed(
    local: PosixTier, remote: PosixTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_run(local, remote)
    for step in range(10, 90, 10):
        commit_checkpoint(remote, CheckpointName(1, step))
    newest = CheckpointName(1, 80)
    life = Life(incarnation=1, host="", boot_id="", started=0.0, heartbeat=60.0, newest_durable=str(newest))
    remote.replace(layout.life(1), life.to_json())
    monkeypatch.setattr(catalog, "PAGE_NAMES", 4)
    named: list[str] = []

    class Counted(PosixTier):
        def list(self, folder: str, *, after: str = "", most: int | None = None) -> list[str]:
            found = super().list(folder, after=after, most=most)
            named.extend(found if folder == layout.MANIFESTS else [])
            return found

    opened = open_run(local, Counted(remote.root))
    assert opened.restored is not None and opened.restored.manifest.name == newest
    assert len(named) == 4 + 1, "the first ones, and the one that the life before told of"


def test_what_crashes_of_earlier_lives_left_is_swept_on_both_tiers(local: PosixTier, remote: PosixTier) -> None:
    open_run(local, remote)
    for tier in (local, remote):
        commit_checkpoint(tier, ONE)
        commit_checkpoint(tier, TWO)
        tier.delete([layout.manifest(TWO)])
        tier.create(f"{layout.STAGING}/{CheckpointName(1, 30)}/file", b"half")
    opening.sweep_remote(remote, open_run(local, remote).incarnation or 0)
    assert local.list(layout.CHECKPOINTS) == [str(ONE)]
    assert str(TWO) in remote.list(layout.CHECKPOINTS), "the agent of the life right before may be about to commit it"
    opening.sweep_remote(remote, open_run(local, remote).incarnation or 0)
    for tier in (local, remote):
        assert tier.list(layout.CHECKPOINTS) == [str(ONE)]
        assert tier.list(layout.STAGING) == []


def test_a_denied_remote_is_not_tried_again(local: PosixTier, remote: PosixTier) -> None:
    plan = FaultPlan(Fault(count=None, error=lambda: TierDeniedError("no such bucket")))
    with pytest.raises(TierDeniedError, match="no such bucket"):
        open_run(local, FaultyTier(remote, plan))
    assert len(plan.operations) == 1


def test_a_remote_that_stays_down_is_an_error_that_says_what_is_safe(local: PosixTier, remote: PosixTier) -> None:
    plan = FaultPlan(Fault(count=None, error=lambda: TierError("connection refused")))
    with pytest.raises(TierError, match=r"connection refused.*nothing was deleted") as caught:
        open_run(local, FaultyTier(remote, plan))
    assert not isinstance(caught.value, TierDeniedError)
    assert len(plan.operations) == 4
    assert local.list("") == []


def test_a_store_that_overwrites_opens_with_one_warning(
    local: PosixTier,
    overwriting_server: OverwritingS3Server,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(incarnation, "SETTLE_S", 0.05)
    monkeypatch.setattr(incarnation, "_LATE_CLAIMS", 0)  # on a slow machine every claim is later than that
    remote = FsspecTier(f"s3://{overwriting_server.new_bucket()}/run", overwriting_server.options)
    assert [open_run(local, remote).incarnation for _ in range(2)] == [1, 2]
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 2
    assert "secret" not in caplog.text


def test_a_run_that_was_overwritten_by_a_racing_first_life_is_taken_over_or_refused(
    local: PosixTier, remote: PosixTier, memory_path: Path
) -> None:
    identities.create_run(local, remote, IDENTITY, 1.0)
    for number, identity in enumerate((IDENTITY, RunIdentity("testing", {"batch": 8}))):
        other = PosixTier(memory_path / f"other-{number}")
        identities.create_run(other, PosixTier(memory_path / f"fresh-{number}"), identity, 2.0)
        remote.replace(layout.RUN, other.read(layout.RUN))
        if identity == IDENTITY:
            identities.agree(local, remote, IDENTITY)
            assert read_run(local) == read_run(remote) == read_run(other)
        else:
            with pytest.raises(ConfigError, match="batch: 8 there, 4 now"):
                identities.agree(local, remote, IDENTITY)


# -- at every operation ----------------------------------------------------------------------------------------


def _prepared(folder: Path) -> None:
    """A run whose second life begins on the instance of the first: something to restore, to set aside, to sweep."""
    local, remote = PosixTier(folder / "local"), PosixTier(folder / "remote")
    open_run(local, remote)
    for tier in (local, remote):
        commit_checkpoint(tier, ONE)
        commit_checkpoint(tier, TWO, pins=ONE)
        tier.create(f"{layout.checkpoint(CheckpointName(1, 30))}/orphan", b"without a manifest")
    local.delete([f"{layout.checkpoint(TWO)}/checkpoint-20/model.bin"])


@pytest.fixture(params=["first life", "second life", "second life, new instance"])
def template(request: pytest.FixtureRequest, memory_path: Path) -> Path:
    folder = memory_path / "template"
    folder.mkdir()
    if request.param != "first life":
        _prepared(folder)
    if request.param.endswith("instance"):
        shutil.rmtree(folder / "local")
    return folder


def _copy(template: Path, name: str) -> tuple[PosixTier, PosixTier]:
    folder = template.parent / name
    shutil.copytree(template, folder)
    return PosixTier(folder / "local"), PosixTier(folder / "remote")


def _operations(template: Path) -> int:
    local, remote = _copy(template, "counted")
    plan = FaultPlan()
    open_run(FaultyPosixTier(local.root, plan), FaultyTier(remote, plan))
    assert len(plan.operations) > 15
    return len(plan.operations)


def _assert_opened(opened: Opened, local: PosixTier, remote: PosixTier) -> None:
    is_first = not catalog.names(remote)
    assert (opened.restored is None) == is_first
    if opened.restored is not None:
        assert (opened.restored.manifest.name, opened.pin) == (TWO, ONE)
        assert local.list(layout.CHECKPOINTS) == [str(ONE), str(TWO)] == remote.list(layout.CHECKPOINTS)[:2]
    assert opened.incarnation == incarnation.newest(remote) == incarnation.newest(local)
    assert read_run(local) == read_run(remote)
    assert_run_invariants(local, remote, durable=None if is_first else TWO)


@pytest.mark.parametrize("kind", [TierError, CommitUnknownError])
def test_a_failure_of_any_operation_is_retried(template: Path, kind: type[Exception]) -> None:
    for nth, when in product(range(1, _operations(template) + 1), ("before", "after")):
        local, remote = _copy(template, f"{nth}-{when}")
        plan = FaultPlan(Fault(first=nth, when=when, error=lambda: kind("injected")))
        opened = open_run(FaultyPosixTier(local.root, plan), FaultyTier(remote, plan))
        assert len(plan.fired) == 1
        _assert_opened(opened, local, remote)


def test_a_crash_at_any_operation_leaves_a_run_that_opens(template: Path) -> None:
    for nth, when in product(range(1, _operations(template) + 1), ("before", "midway", "after")):
        local, remote = _copy(template, f"{nth}-{when}")
        plan = FaultPlan.crash_at(nth, when)
        with pytest.raises(SimulatedCrash):
            open_run(FaultyPosixTier(local.root, plan), FaultyTier(remote, plan))
        _assert_opened(open_run(local, remote), local, remote)
