"""Claim, drain and restore over a bad network to a real server: everything is durable in the end and comes back."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from spot_core.agent import opening
from spot_core.errors import TierError
from spot_core.store import catalog, layout, resume
from spot_core.store.identity import read_run
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.store.remote import FsspecTier
from spot_core.store.s3_files import PART_BYTES
from spot_core.testing.checkpoints import commit_checkpoint
from spot_core.testing.invariants import assert_run_invariants
from tests.agent.draining import ONE, TWO, drain_all, make_drain
from tests.faultproxy import LOST_REPLY, SLOW_DOWN, UNREACHABLE, Fault, FaultProxy
from tests.opening import open_run
from tests.servers import S3Server


@pytest.fixture
def distant(s3_server: S3Server, proxy: FaultProxy) -> FsspecTier:
    """The remote tier through the bad network."""
    return FsspecTier(f"s3://{s3_server.new_bucket()}/team/run", {**proxy.options, "skip_instance_cache": True})


def plain(distant: FsspecTier, s3_server: S3Server) -> FsspecTier:
    """The same folder as it is, without the bad network."""
    return FsspecTier(distant.url, s3_server.options)


def assert_restored_elsewhere(distant: FsspecTier, folder: Path, name: CheckpointName) -> None:
    local = PosixTier(folder / "new-instance")
    opened = open_run(local, distant)
    assert opened.restored is not None and opened.restored.manifest.name == name
    resume.verify(local, opened.restored.manifest)


def test_a_fifth_of_all_requests_failing_costs_nothing_but_time(
    local: PosixTier, distant: FsspecTier, proxy: FaultProxy, s3_server: S3Server, tmp_path: Path
) -> None:
    draw = random.Random(1)
    faults = [SLOW_DOWN, UNREACHABLE, LOST_REPLY, Fault(status=500), Fault(reset_after_bytes=20)]
    proxy.chooses = lambda _: draw.choice(faults) if draw.random() < 0.2 else None
    assert open_run(local, distant).incarnation is not None
    commit_checkpoint(local, ONE, files={"checkpoint-10/model.bin": os.urandom(2 * PART_BYTES + 1)})
    commit_checkpoint(local, TWO)
    assert drain_all(make_drain(local, distant), patience=5) == [TWO, ONE]
    assert_restored_elsewhere(distant, tmp_path, TWO)
    assert len(proxy.fired) > 10
    there = plain(distant, s3_server)
    for name in (ONE, TWO):
        resume.verify(there, catalog.read_manifest(there, name))
    assert read_run(there) == read_run(local)


def test_a_lost_reply_to_the_manifest_neither_repeats_the_upload_nor_conflicts(
    local: PosixTier, distant: FsspecTier, proxy: FaultProxy, s3_server: S3Server, tmp_path: Path
) -> None:
    open_run(local, distant)
    commit_checkpoint(local, ONE)
    proxy.chooses = lambda request: (
        LOST_REPLY
        if request.method == "PUT" and f"/{layout.MANIFESTS}/" in request.path and len(proxy.fired) < 2
        else None
    )
    assert drain_all(make_drain(local, distant)) == [ONE]
    assert len(proxy.fired) == 2
    puts = [request.path for request in proxy.seen if request.method == "PUT" and request.is_data]
    assert len(puts) == len(set(puts)) == len(catalog.read_manifest(local, ONE).files)
    assert_restored_elsewhere(plain(distant, s3_server), tmp_path, ONE)


def test_a_lost_reply_to_the_claim_still_claims_one_number(
    local: PosixTier, distant: FsspecTier, proxy: FaultProxy
) -> None:
    proxy.chooses = lambda request: (
        LOST_REPLY
        if request.method == "PUT" and f"/{layout.INCARNATIONS}/" in request.path and not proxy.fired
        else None
    )
    assert open_run(local, distant).incarnation == 1
    assert len(proxy.fired) == 1
    assert distant.list(layout.INCARNATIONS) == local.list(layout.INCARNATIONS) == ["000001.json"]


def test_an_outage_during_an_upload_is_ridden_out_and_a_longer_one_is_tried_again(
    local: PosixTier, distant: FsspecTier, proxy: FaultProxy, s3_server: S3Server, tmp_path: Path
) -> None:
    open_run(local, distant)
    commit_checkpoint(local, ONE, files={"checkpoint-10/model.bin": os.urandom(2 * PART_BYTES + 1)})
    until = time.monotonic() + 1.5
    proxy.chooses = lambda request: UNREACHABLE if request.is_data and time.monotonic() < until else None
    assert drain_all(make_drain(local, distant)) == [ONE]
    assert proxy.fired
    commit_checkpoint(local, TWO)
    drain = make_drain(local, distant)
    distant._fs.retries = 2
    proxy.chooses = lambda request: UNREACHABLE
    with pytest.raises(TierError):
        drain_all(drain, patience=1)
    proxy.chooses = lambda request: None
    assert drain_all(drain) == [TWO]
    assert_restored_elsewhere(plain(distant, s3_server), tmp_path, TWO)


def test_a_slow_uplink_is_slow_and_nothing_else(
    local: PosixTier, distant: FsspecTier, proxy: FaultProxy, s3_server: S3Server, tmp_path: Path
) -> None:
    open_run(local, distant)
    manifest = commit_checkpoint(local, ONE, files={"checkpoint-10/model.bin": os.urandom(2 * PART_BYTES + 1)})
    proxy.bandwidth_bytes_s = 8e6  # of each connection; four upload
    shown: list[int] = []
    started = time.monotonic()
    make_drain(local, distant).step(lambda name, done, total: shown.append(done))
    assert time.monotonic() - started > 1.5
    assert shown == sorted(shown) and len(set(shown)) >= 4 and shown[-1] == manifest.total_bytes
    assert_restored_elsewhere(plain(distant, s3_server), tmp_path, ONE)
    assert_run_invariants(local, plain(distant, s3_server))


def test_a_life_killed_in_the_middle_of_an_upload_leaves_nothing_to_pay_for(
    local: PosixTier, distant: FsspecTier, s3_server: S3Server, tmp_path: Path
) -> None:
    """What a SIGKILL leaves in the server: an upload begun and never completed."""
    open_run(local, distant)
    bucket, _, root = distant.url.removeprefix("s3://").partition("/")
    for key in (f"{root}/{layout.checkpoint(ONE)}/model.bin", "another-run/checkpoints/000001-000000000010/model.bin"):
        distant._fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    assert open_run(local, distant).incarnation == 2
    opening.sweep_remote(distant, 2)
    left = [upload["Key"] for upload in distant._fs.list_multipart_uploads(bucket)]
    assert left == ["another-run/checkpoints/000001-000000000010/model.bin"]
