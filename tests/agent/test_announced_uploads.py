"""Several checkpoints wait for a slow uplink when the end is announced: what is uploaded is what it lasts for."""

from __future__ import annotations

import json

import pytest

from spot_core.store import catalog
from spot_core.store.layout import CheckpointName
from spot_core.store.remote import FsspecTier
from spot_core.testing.invariants import assert_run_invariants
from tests.agent.place import Place
from tests.agent.processes import eventually, wait_for_end
from tests.faultproxy import FaultProxy
from tests.servers import S3Server

FIRST, SECOND, THIRD = (CheckpointName(1, step) for step in (10, 20, 30))
FILES, FILE_BYTES = 30, 100_000
UPLINK_BYTES_S = 300_000.0
UPLOAD_S = FILES * FILE_BYTES / UPLINK_BYTES_S


@pytest.mark.parametrize(
    ("lead_s", "durable"),
    [(1.9 * UPLOAD_S, [THIRD]), (360.0 * UPLOAD_S, [THIRD, FIRST]), (0.5 * UPLOAD_S, [THIRD, FIRST])],
    ids=["one of them fits", "both fit", "none fits whole"],
)
def test_an_upload_is_set_aside_only_where_that_rescues_a_newer_one(
    lead_s: float, durable: list[CheckpointName], place: Place, s3_server: S3Server, proxy: FaultProxy
) -> None:
    """Where the newest cannot be rescued any more, what is on its way is the best that there is."""
    remote = FsspecTier(f"s3://{s3_server.new_bucket()}/team/run", s3_server.options)
    notice = place.folder / "preempted"
    trainer = place.trainer()
    trainer.open(**place.options(remote=remote.url, storage_options=proxy.options, notice_file=str(notice)))
    eventually(lambda: place.status().pid, "the agent works")
    proxy.uplink_bytes_s = UPLINK_BYTES_S
    trainer.do("commit", FIRST.step, FILE_BYTES, FILES)
    eventually(lambda: place.status().done_bytes, "the first one is on its way")
    for name in (SECOND, THIRD):
        trainer.do("commit", name.step, FILE_BYTES, FILES)
    notice.write_text(json.dumps({"in_s": lead_s}))
    eventually(lambda: THIRD in catalog.names(remote), "the newest is there in the end")
    assert catalog.names(remote) == durable
    trainer.kill()
    wait_for_end(trainer)
    assert [upload["Key"] for upload in remote._fs.list_multipart_uploads(remote.url.split("/")[2])] == []
    assert_run_invariants(place.local, remote, durable=THIRD)
