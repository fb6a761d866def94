"""One writer per run: every life gets a number of its own, and a stale one commits nothing."""

from __future__ import annotations

import json
import logging
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from spot_core.agent.drain import Drain
from spot_core.errors import FencedError, TierError
from spot_core.snapshot.capture import Snapshotter
from spot_core.snapshot.files import BytesFile
from spot_core.snapshot.writer import CheckpointWriter, Written
from spot_core.store import catalog, incarnation, layout, posix, resume, retention
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.posix import PosixTier
from spot_core.store.remote import FsspecTier
from spot_core.testing.checkpoints import commit_checkpoint
from spot_core.testing.faults import Fault, FaultPlan, FaultyTier
from spot_core.testing.invariants import assert_run_invariants
from tests.faultproxy import FaultProxy
from tests.servers import GivenS3Server, OverwritingS3Server, S3Server, TlsS3Server
from tests.store.claimer import claim_many

CLAIMERS = 8


def test_the_first_life_is_1_and_each_further_one_is_newer(local: PosixTier, remote: PosixTier) -> None:
    assert incarnation.newest(remote) == 0
    assert [incarnation.claim(local, remote, float(life)) for life in range(3)] == [1, 2, 3]
    assert incarnation.newest(remote) == incarnation.newest(local) == 3
    assert json.loads(remote.read(layout.incarnation(2)))["started"] == 1.0


def test_a_new_instance_goes_on_from_the_remotes_number(remote: PosixTier, tmp_path: Path) -> None:
    for life in (1, 2, 3):
        assert incarnation.claim(PosixTier(tmp_path / f"instance-{life}"), remote, 0.0) == life


def test_racing_processes_get_numbers_of_their_own(tmp_path: Path) -> None:
    rounds = 5
    context = multiprocessing.get_context("spawn")
    start, claimed = context.Barrier(CLAIMERS), context.Queue()
    # Two instances, each with a local tier that four processes share.
    processes = [
        context.Process(
            target=claim_many, args=((f"{tmp_path}/local-{number % 2}", f"{tmp_path}/remote"), rounds, start, claimed)
        )
        for number in range(CLAIMERS)
    ]
    for process in processes:
        process.start()
    numbers = [claimed.get(timeout=60) for _ in range(CLAIMERS * rounds)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(set(numbers)) == CLAIMERS * rounds
    assert incarnation.newest(PosixTier(tmp_path / "remote")) == max(numbers)


def test_racing_instances_get_numbers_of_their_own_on_s3(s3_store: TlsS3Server | GivenS3Server, tmp_path: Path) -> None:
    count, url = 16, f"s3://{s3_store.new_bucket()}/run"
    context = multiprocessing.get_context("spawn")
    start, claimed = context.Barrier(count), context.Queue()
    processes = [
        context.Process(
            target=claim_many, args=((f"{tmp_path}/instance-{number}", url), 1, start, claimed, s3_store.options)
        )
        for number in range(count)
    ]
    for process in processes:
        process.start()
    assert sorted(claimed.get(timeout=60) for _ in processes) == list(range(1, count + 1))
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    tier = FsspecTier(url, s3_store.options)
    tokens = [json.loads(tier.read(layout.incarnation(number)))["token"] for number in range(1, count + 1)]
    assert len(set(tokens)) == count


def test_a_store_that_overwrites_is_told_once_and_racing_claims_still_differ(
    overwriting_server: OverwritingS3Server,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"s3://{overwriting_server.new_bucket()}/run"
    monkeypatch.setattr(incarnation, "SETTLE_S", 1.0)
    start = threading.Barrier(4)

    def claim(number: int) -> int:
        remote = FsspecTier(url, {**overwriting_server.options, "skip_instance_cache": True})
        remote.list("")
        start.wait(timeout=60)
        local = PosixTier(tmp_path / f"instance-{number}")
        try:
            return incarnation.claim(local, remote, 0.0)
        except TierError:
            # This server takes a file away while it is written again. Whoever opens a run tries again too.
            return incarnation.claim(local, remote, 0.0)

    with ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(claim, range(4)))
    assert len(set(numbers)) == 4, "however slow the machine: a claim that was slower than the others' wait is given up"
    told = [record for record in caplog.records if "does not refuse to overwrite" in record.getMessage()]
    assert [record.levelname for record in told] == ["WARNING"] * 4, "one for each life"
    assert url in told[0].getMessage()


@pytest.mark.usefixtures("never_late")
def test_a_store_that_ignores_the_condition_is_found_out_by_the_claim_alone(
    lenient_server: S3Server, local: PosixTier, caplog: pytest.LogCaptureFixture
) -> None:
    """No file is written for finding out, and a store that refuses is not waited for and not warned about."""
    waited: list[float] = []
    with FaultProxy(lenient_server.port) as proxy:
        remote = FsspecTier(f"s3://{lenient_server.new_bucket()}/run", proxy.options)
        assert incarnation.claim(local, remote, 0.0, wait=waited.append) == 1
        assert not waited and not caplog.records
        proxy.strips = {"if-none-match"}
        assert incarnation.claim(local, remote, 0.0, wait=waited.append) == 2
        assert waited == [incarnation.SETTLE_S] and len(caplog.records) == 1
        assert {request.path for request in proxy.seen if request.method == "PUT"} == {
            f"/{remote.url.removeprefix('s3://')}/{layout.incarnation(number)}" for number in (1, 2)
        }


@pytest.mark.usefixtures("never_late")
def test_a_claim_that_another_was_written_over_is_given_up(lenient_server: S3Server, local: PosixTier) -> None:
    with FaultProxy(lenient_server.port) as proxy:
        proxy.strips = {"if-none-match"}
        remote = FsspecTier(f"s3://{lenient_server.new_bucket()}/run", proxy.options)

        def another_claims(_: float) -> None:
            if incarnation.newest(remote) == 1:
                remote.replace(layout.incarnation(1), b"another's")

        assert incarnation.claim(local, remote, 0.0, wait=another_claims) == 2
        assert remote.read(layout.incarnation(1)) == b"another's"
        assert local.list(layout.INCARNATIONS) == ["000002.json"]


def test_a_claim_whose_reply_was_lost_costs_a_number_and_nothing_else(local: PosixTier, remote: PosixTier) -> None:
    plan = FaultPlan(Fault(operation="create", when="after"))
    with pytest.raises(TierError):
        incarnation.claim(local, FaultyTier(remote, plan), 0.0)
    assert incarnation.claim(local, FaultyTier(remote, plan), 0.0) == 2
    assert len(plan.fired) == 1


# -- the fence -------------------------------------------------------------------------------------------------


def test_the_newest_life_is_not_fenced(local: PosixTier, remote: PosixTier) -> None:
    number = incarnation.claim(local, remote, 0.0)
    incarnation.check_fence(remote, number)


def test_an_older_life_is_fenced_and_told_what_to_do(local: PosixTier, remote: PosixTier) -> None:
    old = incarnation.claim(local, remote, 0.0)
    incarnation.claim(local, remote, 0.0)
    with pytest.raises(FencedError, match=r"incarnation 1 is fenced: incarnation 2 .* commits nothing more"):
        incarnation.check_fence(remote, old)


def test_a_stale_drain_uploads_and_deletes_nothing(local: PosixTier, remote: PosixTier, tmp_path: Path) -> None:
    old = incarnation.claim(local, remote, 0.0)
    drain = Drain(local, remote, incarnation=old, keep_local=1, keep_remote=1)
    commit_checkpoint(local, CheckpointName(old, 1))
    assert drain.step(lambda *_: None) is not None
    commit_checkpoint(local, CheckpointName(old, 2))
    incarnation.claim(PosixTier(tmp_path / "another-instance"), remote, 0.0)
    with pytest.raises(FencedError):
        drain.step(lambda *_: None)
    assert catalog.names(remote) == [CheckpointName(old, 1)]
    assert remote.list(layout.CHECKPOINTS) == [str(CheckpointName(old, 1))]
    assert catalog.names(local) == [CheckpointName(old, 2), CheckpointName(old, 1)]


def test_a_drain_that_is_fenced_during_the_upload_writes_no_manifest(
    local: PosixTier, remote: PosixTier, tmp_path: Path
) -> None:
    old = incarnation.claim(local, remote, 0.0)
    commit_checkpoint(local, CheckpointName(old, 1))
    drain = Drain(local, remote, incarnation=old, keep_local=1, keep_remote=1)

    def claim_during_the_upload(name: CheckpointName, done: int, total: int) -> None:
        if done == total:
            incarnation.claim(PosixTier(tmp_path / "another-instance"), remote, 0.0)

    with pytest.raises(FencedError):
        drain.step(claim_during_the_upload)
    assert catalog.names(remote) == []
    assert remote.list(layout.CHECKPOINTS) == [str(CheckpointName(old, 1))]  # swept by the newer life
    assert_run_invariants(local, remote)


def test_a_drain_whose_upload_is_swept_by_a_newer_life_is_fenced_at_the_next_attempt(
    local: PosixTier, remote: PosixTier, tmp_path: Path
) -> None:
    """Its trainer was killed and relaunched while the agent still drained: the sweep takes files from under it."""
    old = incarnation.claim(local, remote, 0.0)
    name = CheckpointName(old, 1)
    commit_checkpoint(local, name)

    class SweptUnderway(PosixTier):
        def upload(self, *args: object) -> None:
            super().upload(*args)  # type: ignore[arg-type]
            if incarnation.newest(remote) == old:
                incarnation.claim(PosixTier(tmp_path / "another-instance"), remote, 0.0)
            remote.delete([layout.checkpoint(name)])

    drain = Drain(local, SweptUnderway(remote.root), incarnation=old, keep_local=1, keep_remote=1)
    with pytest.raises(TierError, match="vanished"):
        drain.step(lambda *_: None)
    with pytest.raises(FencedError):
        drain.step(lambda *_: None)
    assert catalog.names(remote) == []


def test_a_claim_whose_file_is_swept_by_a_newer_life_succeeds_at_the_next_attempt(
    local: PosixTier, remote: PosixTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six instances start at once: the one that loses number 1 may find its file swept by the one that has 2."""
    unpatched = posix.write_durably

    def overtaken(path: Path, data: bytes) -> None:
        unpatched(path, data)
        monkeypatch.setattr(posix, "write_durably", unpatched)
        other = PosixTier(tmp_path / "another-instance")
        newer = [incarnation.claim(other, remote, float(life)) for life in (2, 3)]
        retention.sweep_orphans(remote, [], before_incarnation=newer[-1])

    monkeypatch.setattr(posix, "write_durably", overtaken)
    with pytest.raises(TierError, match="a newer life swept"):
        incarnation.claim(local, remote, 1.0)
    assert incarnation.claim(local, remote, 1.0) == 3


def _write(local: PosixTier, name: CheckpointName, path: str = "state.bin") -> Written:
    """One checkpoint of a few bytes, through the writer of a trainer."""
    snapshotter = Snapshotter(torch.device("cpu"))
    writer = CheckpointWriter(local, snapshotter, number=name.incarnation)
    results: list[Written] = []
    manifest = Manifest(
        run="run", name=name, epoch=0.0, useful_s=0.0, created=1.0, framework="testing", native=path, files=()
    )
    writer.submit(snapshotter.take([BytesFile(path=path, content=lambda: b"state")]), manifest, results.append)
    writer.wait()
    snapshotter.gate()
    writer.close()
    snapshotter.close()
    return results[0]


def test_a_stale_writer_commits_nothing_and_leaves_nothing(
    local: PosixTier, remote: PosixTier, caplog: pytest.LogCaptureFixture
) -> None:
    old = incarnation.claim(local, remote, 0.0)
    assert _write(local, CheckpointName(old, 1)).error is None
    incarnation.claim(local, remote, 0.0)
    with caplog.at_level(logging.DEBUG):
        written = _write(local, CheckpointName(old, 2))
    assert isinstance(written.error, FencedError)
    assert not caplog.records  # it surfaces at the next step boundary, with its own message
    assert catalog.names(local) == [CheckpointName(old, 1)]
    assert local.list(layout.CHECKPOINTS) == [str(CheckpointName(old, 1))]
    assert local.list(layout.STAGING) == []


def test_a_writer_that_failed_at_the_manifest_can_write_the_same_step_again(
    local: PosixTier, remote: PosixTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are in place already, without a manifest: they are no checkpoint, and must not be in the way."""
    number = incarnation.claim(local, remote, 0.0)
    create = PosixTier.create

    def full(tier: PosixTier, path: str, data: bytes) -> None:
        raise TierError(28, "No space left on device")

    monkeypatch.setattr(PosixTier, "create", full)
    assert isinstance(_write(local, CheckpointName(number, 1)).error, TierError)
    monkeypatch.setattr(PosixTier, "create", create)
    assert catalog.names(local) == []
    assert _write(local, CheckpointName(number, 1), path="other.bin").error is None
    manifest = catalog.read_manifest(local, CheckpointName(number, 1))
    resume.verify(local, manifest)
    assert local.list(f"{layout.checkpoint(manifest.name)}") == ["other.bin"]


def test_a_committed_name_is_never_written_over(local: PosixTier, remote: PosixTier) -> None:
    number = incarnation.claim(local, remote, 0.0)
    name = CheckpointName(number, 1)
    commit_checkpoint(local, name)
    before = catalog.read_manifest(local, name)
    assert _write(local, name).error is not None
    assert catalog.read_manifest(local, name) == before
    resume.verify(local, before)
