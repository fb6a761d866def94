"""What lies in a run's folder is not trusted: links, special files, strangers, absurd sizes and records are refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from spot_core.agent.lives import Life, read_lives
from spot_core.errors import ConfigError, CorruptCheckpointError, TierDeniedError
from spot_core.store import catalog, incarnation, layout, resume, retention
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import FileRecord
from spot_core.store.posix import PosixTier, check_usable
from spot_core.store.tier import RECORD_BYTES, Tier, open_tier
from spot_core.testing.checkpoints import commit_checkpoint, content_of
from spot_core.testing.faults import FaultPlan, FaultyTier
from tests.agent.draining import drain_all, make_drain
from tests.servers import S3Server
from tests.trees import tree

OLD, NEW = CheckpointName(1, 10), CheckpointName(1, 20)


def restore(local: PosixTier, remote: Tier) -> CheckpointName | None:
    restored = resume.newest_valid(local, remote, lambda *_: None)
    return restored.manifest.name if restored is not None else None


def move_away(path: Path, elsewhere: Path) -> None:
    """The very same content, at the end of a link."""
    elsewhere.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


# Which part of a committed checkpoint is a link.
LINKS: dict[str, str] = {
    "a file": f"checkpoints/{NEW}/checkpoint-20/model.bin",
    "a folder in it": f"checkpoints/{NEW}/checkpoint-20/state",
    "its folder": f"checkpoints/{NEW}",
    "the folder of all": "checkpoints",
    "the manifest": f"manifests/{NEW}.json",
}


@pytest.mark.parametrize(
    ("place", "which"), [(p, w) for p in ("local", "remote") for w in LINKS if (p, w) != ("local", "the folder of all")]
)
def test_a_link_in_a_checkpoint_is_not_followed(
    local: PosixTier, remote: PosixTier, tmp_path: Path, place: str, which: str
) -> None:
    """Whole and verified when looked at, it may lead somewhere else a moment later."""
    tier, other = (local, remote) if place == "local" else (remote, local)
    commit_checkpoint(tier, NEW)
    commit_checkpoint(other, OLD)
    move_away(tier.path(LINKS[which]), tmp_path / "elsewhere")
    assert restore(local, remote) == OLD
    assert (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("which", LINKS)
def test_a_link_in_a_checkpoint_is_not_drained_and_not_verified(
    local: PosixTier, remote: PosixTier, tmp_path: Path, which: str
) -> None:
    incarnation.claim(local, remote, 0.0)
    manifest = commit_checkpoint(local, NEW)
    move_away(local.path(LINKS[which]), tmp_path / "elsewhere")
    drain = make_drain(local, remote)
    drain_all(drain)
    assert drain.refused == {NEW} and catalog.names(remote) == []
    if which != "the manifest":
        assert resume.damaged_files(local, manifest, lambda _: None)


@pytest.mark.parametrize("which", ["a file", "a folder in it", "its folder", "the manifest"])
def test_deleting_takes_the_link_and_leaves_what_it_points_to(local: PosixTier, tmp_path: Path, which: str) -> None:
    commit_checkpoint(local, NEW)
    move_away(local.path(LINKS[which]), tmp_path / "elsewhere")
    place = tmp_path / "elsewhere"
    before = tree(place) if place.is_dir() else place.read_bytes()
    retention.delete_checkpoints(local, [NEW])
    assert local.list(layout.CHECKPOINTS) == local.list(layout.MANIFESTS) == []
    assert (tree(place) if place.is_dir() else place.read_bytes()) == before


def test_nothing_is_written_or_deleted_through_a_linked_folder(local: PosixTier, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / str(NEW)).mkdir(parents=True)
    (elsewhere / f"{NEW}.json").write_text("somebody's")
    local.root.mkdir()
    for folder in (layout.CHECKPOINTS, layout.MANIFESTS, layout.STAGING):
        local.path(folder).symlink_to(elsewhere)
    before = tree(elsewhere)
    attempts: list[Callable[[], object]] = [
        lambda: local.delete([layout.checkpoint(NEW)]),
        lambda: local.delete([layout.manifest(NEW)]),
        lambda: local.create(layout.manifest(OLD), b"{}"),
        lambda: local.replace(layout.manifest(OLD), b"{}"),
        lambda: local.upload(tmp_path / "elsewhere" / f"{NEW}.json", layout.manifest(OLD), lambda _: None),
        lambda: local.stage(NEW),
    ]
    for attempt in attempts:
        with pytest.raises(TierDeniedError, match="is a symbolic link"):
            attempt()
    assert tree(elsewhere) == before


@pytest.mark.parametrize("is_dangling", [False, True])
def test_a_link_in_the_place_of_a_new_checkpoint_is_replaced(
    local: PosixTier, tmp_path: Path, is_dangling: bool
) -> None:
    if not is_dangling:
        (tmp_path / "elsewhere").mkdir()
    for place in (local.path(layout.checkpoint(NEW)), local.path(f"{layout.STAGING}/{NEW}")):
        place.parent.mkdir(parents=True)
        place.symlink_to(tmp_path / "elsewhere")
    manifest = commit_checkpoint(local, NEW)
    resume.verify(local, manifest)
    assert (tmp_path / "elsewhere").exists() != is_dangling and tree(tmp_path / "elsewhere") == {}


def test_a_local_folder_in_which_no_checkpoint_could_be_committed_is_refused_at_start(
    local: PosixTier, tmp_path: Path
) -> None:
    commit_checkpoint(local, NEW)
    move_away(local.path(layout.CHECKPOINTS), tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"local/checkpoints is a symbolic link.*Move or link the whole folder"):
        check_usable(local.root, 0)


def test_a_run_folder_that_is_a_link_is_the_users_choice(tmp_path: Path) -> None:
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "nvme").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "local").symlink_to(tmp_path / "disk" / "run")
    local, remote = PosixTier(tmp_path / "nvme" / "local"), PosixTier(tmp_path / "nvme" / "remote")
    incarnation.claim(local, remote, 0.0)
    commit_checkpoint(local, NEW)
    drain_all(make_drain(local, remote))
    assert restore(local, remote) == restore(PosixTier(tmp_path / "other"), remote) == NEW
    retention.delete_checkpoints(local, [NEW])
    assert catalog.names(local) == []


def test_a_pipe_in_a_checkpoint_is_refused_and_not_waited_for(local: PosixTier, remote: PosixTier) -> None:
    for name in (OLD, NEW):
        commit_checkpoint(local, name)
    file = local.path(f"{layout.checkpoint(NEW)}/checkpoint-20/model.bin")
    file.unlink()
    os.mkfifo(file)
    assert restore(local, remote) == OLD


# -- what the manifest does not name ---------------------------------------------------------------------------


def test_files_that_the_manifest_does_not_name_are_not_left_where_they_would_be_loaded(
    local: PosixTier, remote: PosixTier, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit_checkpoint(local, NEW)
    folder = local.path(layout.checkpoint(NEW))
    (folder / "checkpoint-20" / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "more").mkdir()
    (folder / "more" / "spot_state.pt").write_bytes(b"another")
    (folder / "checkpoint-20" / "linked").symlink_to(tmp_path)
    assert restore(local, remote) == NEW
    stay = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    assert stay == set(content_of(NEW))
    (aside,) = local.path(layout.DAMAGED).iterdir()
    assert (aside / "checkpoint-20" / "pytorch_model.bin").read_bytes() == b"a pickle"
    assert (aside / "more" / "spot_state.pt").exists() and (aside / "checkpoint-20" / "linked").is_symlink()
    assert "held 3 files that its manifest does not name ('checkpoint-20/linked', " in caplog.text


def test_a_sound_checkpoint_is_left_as_it_is(local: PosixTier, remote: PosixTier) -> None:
    commit_checkpoint(local, NEW)
    before = tree(local.root)
    assert restore(local, remote) == NEW
    assert tree(local.root) == before


def test_what_a_resume_would_refuse_is_not_committed(local: PosixTier) -> None:
    """Refused while the state is still in memory, not when it is all there is."""
    for files in ({"checkpoint-10/A.bin": b"", "checkpoint-10/a.bin": b""}, {"other/model.bin": b""}):
        with pytest.raises(CorruptCheckpointError):
            commit_checkpoint(local, OLD, files=files)
    with pytest.raises(CorruptCheckpointError):
        commit_checkpoint(local, OLD, more={"epoch": float("nan")})
    assert catalog.names(local) == [] and local.list(layout.CHECKPOINTS) == []


# -- sizes -----------------------------------------------------------------------------------------------------


def announce(tier: Tier, name: CheckpointName, size_bytes: int) -> None:
    """The manifest says that the model has that many bytes."""
    manifest = catalog.read_manifest(tier, name)
    model, *others = manifest.files
    announced = replace(manifest, files=(FileRecord(model.path, size_bytes, model.digest), *others))
    tier.replace(layout.manifest(name), announced.to_json())


@pytest.mark.parametrize("size_bytes", [1, 1 << 45])
def test_sizes_are_compared_before_a_byte_is_downloaded(local: PosixTier, remote: PosixTier, size_bytes: int) -> None:
    for name in (OLD, NEW):
        commit_checkpoint(remote, name)
    announce(remote, NEW, size_bytes)
    plan = FaultPlan()
    assert restore(local, FaultyTier(remote, plan)) == OLD
    downloads = [line for line in plan.operations if line.startswith("remote.download")]
    assert downloads and all(str(OLD) in line for line in downloads)


def test_sizes_are_compared_on_s3_too(local: PosixTier, tmp_path: Path, s3_server: S3Server) -> None:
    remote = open_tier(f"s3://{s3_server.new_bucket()}/run", s3_server.options)
    incarnation.claim(local, remote, 0.0)
    for name in (OLD, NEW):
        commit_checkpoint(local, name)
    drain_all(make_drain(local, remote))
    announce(remote, NEW, 1 << 45)
    plan = FaultPlan()
    assert restore(PosixTier(tmp_path / "other"), FaultyTier(remote, plan)) == OLD
    assert not [line for line in plan.operations if line.startswith("remote.download") and str(NEW) in line]


@pytest.fixture(params=["folder", "s3", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Tier:
    if request.param == "folder":
        return PosixTier(tmp_path / "remote")
    if request.param == "memory":
        return open_tier(f"memory://{tmp_path}/run")
    server: S3Server = request.getfixturevalue("s3_server")
    return open_tier(f"s3://{server.new_bucket()}/run", server.options)


def test_a_record_that_is_absurdly_large_is_not_read_whole(store: Tier, local: PosixTier, tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    huge.touch()
    os.truncate(huge, RECORD_BYTES + 1)
    store.upload(huge, layout.manifest(NEW), lambda _: None)
    with pytest.raises(CorruptCheckpointError, match=f"no record has more than {RECORD_BYTES}"):
        store.read(layout.manifest(NEW))
    with pytest.raises(CorruptCheckpointError, match="1 checkpoints exist"):
        restore(local, store)


def test_an_empty_record_is_a_damaged_one(store: Tier, local: PosixTier) -> None:
    store.create(layout.manifest(NEW), b"")
    assert store.read(layout.manifest(NEW)) == b""
    with pytest.raises(CorruptCheckpointError, match="is damaged"):
        restore(local, store)


def test_a_record_of_the_largest_size_is_read(local: PosixTier) -> None:
    local.create("manifests/x.json", bytes(RECORD_BYTES))
    assert len(local.read("manifests/x.json")) == RECORD_BYTES


# -- records ---------------------------------------------------------------------------------------------------

LIFE = Life(incarnation=1, host="host", boot_id="boot", started=0.0, heartbeat=1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"heartbeat": "text"},
        {"started": None},
        {"useful_s": float("nan")},
        {"heartbeat": float("inf")},
        {"started": 10**400},
        {"incarnation": 1.5},
        {"step": -1},
        {"step": True},
        {"host": 7},
        {"outcome": ["running"]},
    ],
    ids=str,
)
def test_a_life_that_makes_no_sense_is_left_out(
    remote: PosixTier, caplog: pytest.LogCaptureFixture, changes: dict[str, object]
) -> None:
    remote.create(layout.life(1), json.dumps({**json.loads(LIFE.to_json()), **changes}).encode())
    remote.create(layout.life(2), replace(LIFE, incarnation=2).to_json())
    assert [life.incarnation for life in read_lives(remote)] == [2]
    assert "000001.json is not readable and is left out" in caplog.text


def test_a_life_that_is_a_link_or_no_record_is_left_out(remote: PosixTier, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(LIFE.to_json())
    remote.create(layout.life(2), b"[" * 100_000)
    remote.path(layout.life(1)).symlink_to(tmp_path / "elsewhere")
    assert read_lives(remote) == []


@pytest.mark.parametrize("body", [b"[]", b'{"max_steps": "20"}', b'{"max_steps": true}', b"[" * 100_000])
def test_an_end_of_training_that_makes_no_sense_is_ignored(
    remote: PosixTier, caplog: pytest.LogCaptureFixture, body: bytes
) -> None:
    commit_checkpoint(remote, NEW)
    remote.create(layout.completion(NEW), body)
    assert catalog.completions(remote) == {}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_the_last_number_of_a_life_is_said_to_be_taken(local: PosixTier, remote: PosixTier) -> None:
    """One more digit, and what this life commits would never be listed."""
    remote.create(layout.incarnation(999_999), b"{}")
    with pytest.raises(ConfigError, match=r"999999\.json is the last life.*somebody else wrote it"):
        incarnation.claim(local, remote, 0.0)
    assert remote.list(layout.INCARNATIONS) == ["999999.json"]
