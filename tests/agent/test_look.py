"""What was seen of a remote before the run was opened saves asking, and never decides anything that has changed."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from spot_core.agent import look
from spot_core.agent.look import EarlyLook
from spot_core.agent.opening import Opened
from spot_core.errors import ConfigError, TierError
from spot_core.store import catalog, layout
from spot_core.store.identity import RunIdentity
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.store.remote import FsspecTier
from spot_core.store.tier import Tier
from spot_core.testing.checkpoints import commit_checkpoint
from spot_core.testing.faults import Fault, FaultPlan, FaultyTier
from tests.opening import open_run
from tests.servers import S3Server

ONE, TWO, THREE = (CheckpointName(1, step) for step in (10, 20, 30))


@pytest.fixture
def local(memory_path: Path) -> PosixTier:
    return PosixTier(memory_path / "local")


@pytest.fixture
def remote(memory_path: Path) -> PosixTier:
    """Of a run that another instance has begun, with one checkpoint."""
    tier, elsewhere = PosixTier(memory_path / "remote"), PosixTier(memory_path / "elsewhere")
    open_run(elsewhere, tier)
    commit_checkpoint(tier, ONE)
    return tier


def seen(remote: Tier) -> EarlyLook:
    """A look that is done."""
    early = EarlyLook(remote)
    assert early._answer is not None
    early._answer.result(10)
    return early


def restored(opened: Opened) -> CheckpointName | None:
    return opened.restored.manifest.name if opened.restored is not None else None


def asked(plan: FaultPlan) -> list[str]:
    return [line for line in plan.operations if line.startswith("remote.")]


def test_what_was_seen_is_not_asked_for_again(local: PosixTier, remote: PosixTier) -> None:
    plan = FaultPlan()
    tier = FaultyTier(remote, plan)
    early = seen(tier)
    found = asked(plan)
    assert f"remote.read {layout.manifest(ONE)}" in found and f"remote.read {layout.RUN}" in found
    plan.operations.clear()
    opened = open_run(local, tier, early)
    assert (restored(opened), opened.incarnation) == (ONE, 2)
    before_the_claim = asked(plan)[: asked(plan).index(f"remote.create {layout.incarnation(2)}")]
    assert f"remote.read {layout.manifest(ONE)}" not in before_the_claim
    assert f"remote.list {layout.MANIFESTS}" not in before_the_claim


def test_a_checkpoint_that_came_after_the_look_is_restored(local: PosixTier, remote: PosixTier) -> None:
    early = seen(remote)
    commit_checkpoint(remote, TWO)
    assert restored(open_run(local, remote, early)) == TWO


def test_one_that_is_gone_since_the_look_is_replaced_by_what_superseded_it(local: PosixTier, remote: PosixTier) -> None:
    early = seen(remote)
    for name in (TWO, THREE):
        commit_checkpoint(remote, name)
    remote.delete([layout.manifest(ONE), layout.checkpoint(ONE)])
    assert restored(open_run(local, remote, early)) == THREE


def test_the_local_copy_is_used_whatever_was_read_of_the_remote(local: PosixTier, remote: PosixTier) -> None:
    open_run(local, remote)
    early = seen(remote)
    shutil.rmtree(remote.root / layout.checkpoint(ONE))
    opened = open_run(local, remote, early)
    assert opened.restored is not None and (opened.restored.source, restored(opened)) == ("local", ONE)


def test_a_run_that_began_after_the_look_is_not_written_to_by_another(local: PosixTier, memory_path: Path) -> None:
    empty = PosixTier(memory_path / "new")
    early = seen(empty)
    open_run(PosixTier(memory_path / "faster"), empty, identity=RunIdentity("testing", {"batch": 8}))
    with pytest.raises(ConfigError, match="batch: 8 there, 4 now"):
        open_run(local, empty, early)
    assert local.list("") == []


def test_a_look_that_failed_is_made_again(local: PosixTier, remote: PosixTier) -> None:
    plan = FaultPlan(Fault(operation="list", error=lambda: TierError("no network yet")))
    tier = FaultyTier(remote, plan)
    early = EarlyLook(tier)
    assert early._answer is not None
    assert isinstance(early._answer.exception(10), TierError)
    assert restored(open_run(local, tier, early)) == ONE


def test_a_look_that_takes_long_is_not_waited_for(
    local: PosixTier, remote: PosixTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()

    class Slow(FaultyTier):
        def list(self, folder: str, *, after: str = "", most: int | None = None) -> list[str]:
            if threading.current_thread().name == "bounded":
                answers.wait(60)
            return super().list(folder, after=after, most=most)

    monkeypatch.setattr(look, "_ENDS_S", 0.1)
    early = EarlyLook(Slow(remote, FaultPlan()))
    try:
        assert early.take() is None
        assert restored(open_run(local, remote, early)) == ONE
    finally:
        answers.set()


def test_an_old_look_is_not_used(local: PosixTier, remote: PosixTier, monkeypatch: pytest.MonkeyPatch) -> None:
    early = seen(remote)
    commit_checkpoint(remote, TWO)
    monkeypatch.setattr(look, "_LASTS_S", 0.0)
    plan = FaultPlan()
    assert restored(open_run(local, FaultyTier(remote, plan), early)) == TWO
    assert asked(plan)[0] == f"remote.list {layout.MANIFESTS}"


def test_a_look_is_given_once(remote: PosixTier) -> None:
    early = seen(remote)
    found = early.take()
    assert found is not None and found.recent.names == [ONE]
    assert found.recent.manifest == catalog.read_manifest(remote, ONE)
    assert early.take() is None


@pytest.mark.s3
def test_on_s3(local: PosixTier, remote: PosixTier, s3_server: S3Server) -> None:
    tier = FsspecTier(f"s3://{s3_server.new_bucket()}/run", s3_server.options)
    for path in sorted(path for path in remote.root.rglob("*") if path.is_file()):
        tier.upload(path, str(path.relative_to(remote.root)), lambda _: None)
    opened = open_run(local, tier, seen(tier))
    assert (restored(opened), opened.incarnation) == (ONE, 2)
