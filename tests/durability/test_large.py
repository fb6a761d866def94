"""A large checkpoint goes to a real S3 server and comes back; the agent's memory does not grow with it.

The deep version moves 5 GB, once in one file and once in five of them, of which four travel at a time.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from spot_core.store import resume
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.posix import PosixTier
from spot_core.store.tier import digest_file
from tests.agent.place import Place
from tests.agent.processes import TrainerProcess, eventually
from tests.durability.scale import IS_DEEP, times
from tests.servers import OverwritingS3Server, S3Server

TOTAL_BYTES = times(200 << 20, 5 << 30)
MOST_BYTES = 500e6
NAME = CheckpointName(1, 10)
_BLOCK_BYTES = 16 << 20
_PATIENCE_S = 1500.0


@pytest.fixture
def server(request: pytest.FixtureRequest) -> S3Server | OverwritingS3Server:
    """The default server keeps what is uploaded in memory, several times while it puts the parts together."""
    found = request.getfixturevalue("overwriting_server" if IS_DEEP else "s3_server")
    assert isinstance(found, (S3Server, OverwritingS3Server))
    return found


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("files", [1, 5])
def test_a_large_checkpoint_drains_and_restores_in_little_memory(
    files: int, place: Place, server: S3Server | OverwritingS3Server
) -> None:
    options = {"remote": f"s3://{server.new_bucket()}/team/run", "storage_options": server.options}
    first = place.trainer()
    first.open(**place.options(**options))
    manifest = commit_random(place.local, files)
    began = time.monotonic()
    eventually(lambda: place.status().newest_durable == str(NAME), "it is durable", timeout_s=_PATIENCE_S)
    drained_s, drain_bytes = time.monotonic() - began, peak_bytes(first)
    first.close()
    second, began = place.trainer(), time.monotonic()
    instance = place.folder / "another-instance"
    opened = second.open(**{**place.options(**options), "local": str(instance)})
    restored_s, restore_bytes = time.monotonic() - began, peak_bytes(second)
    print(
        f"{manifest.total_bytes / 1e6:,.0f} MB in {files} files: drained in {drained_s:.0f} s with "
        f"{drain_bytes / 1e6:.0f} MB of memory, restored in {restored_s:.0f} s with {restore_bytes / 1e6:.0f} MB"
    )
    assert (opened["restored"], opened["source"]) == (str(NAME), "remote")
    resume.verify(PosixTier(instance / "run"), manifest)
    assert drain_bytes < MOST_BYTES
    assert restore_bytes < MOST_BYTES


def commit_random(tier: PosixTier, files: int) -> Manifest:
    """A checkpoint of so many files, which no server can keep in less space."""
    staged, records = tier.stage(NAME), []
    for number in range(files):
        path = staged / f"checkpoint-10/part-{number}.bin"
        path.parent.mkdir(exist_ok=True)
        with open(path, "wb", buffering=0) as file:
            for _ in range(TOTAL_BYTES // files // _BLOCK_BYTES):
                file.write(os.urandom(_BLOCK_BYTES))
            os.fsync(file.fileno())
        records.append(replace(digest_file(path), path=f"checkpoint-10/{path.name}"))
    manifest = Manifest(
        run="run",
        name=NAME,
        epoch=1.0,
        useful_s=10.0,
        created=time.time(),
        framework="testing",
        native="checkpoint-10",
        files=tuple(records),
    )
    tier.commit(staged, manifest)
    return manifest


def peak_bytes(trainer: TrainerProcess) -> int:
    """The most memory that the trainer's agent has had so far."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{trainer.agent}/status").read_text())
    assert found is not None
    return int(found[1]) << 10
