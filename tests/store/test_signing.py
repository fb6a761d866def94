"""Signatures: what a stranger writes into the bucket is refused by name, and what a life committed still resumes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spot_core.errors import CorruptCheckpointError
from spot_core.store import catalog, incarnation, layout, resume
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.store.signing import Signing
from spot_core.store.tier import Tier, open_tier
from spot_core.testing.checkpoints import commit_checkpoint, content_of
from tests.agent.draining import drain_all, make_drain
from tests.servers import S3Server
from tests.trees import tree

KEY, OLD_KEY, OTHER = "key of this run 0", "earlier key of it", "key of a stranger"
OLD, NEW = CheckpointName(1, 10), CheckpointName(1, 20)
NOT_SIGNED = "is not signed with this run's key"


def tier_of(folder: Path, *keys: str, run: str = "run") -> PosixTier:
    return PosixTier(folder, Signing(run, keys))


@pytest.fixture
def local(tmp_path: Path) -> PosixTier:
    return tier_of(tmp_path / "local", KEY)


@pytest.fixture
def remote(tmp_path: Path) -> PosixTier:
    return tier_of(tmp_path / "remote", KEY)


@pytest.fixture
def stranger(remote: PosixTier) -> PosixTier:
    """The bucket as somebody sees it who can write there but has no key."""
    return PosixTier(remote.root)


def restore(local: PosixTier, remote: Tier) -> resume.Restored | None:
    return resume.newest_valid(local, remote, lambda *_: None)


def rewrite(tier: PosixTier, path: str, change: Callable[[dict[str, Any]], object]) -> None:
    body = json.loads(tier.read(path))
    change(body)
    tier.replace(path, json.dumps(body).encode())


# -- what is refused -------------------------------------------------------------------------------------------


def test_a_checkpoint_of_a_stranger_is_refused_by_name_and_the_next_older_one_is_used(
    local: PosixTier, remote: PosixTier, stranger: PosixTier, caplog: pytest.LogCaptureFixture
) -> None:
    commit_checkpoint(remote, OLD)
    commit_checkpoint(stranger, NEW)
    restored = restore(local, remote)
    assert restored is not None and (restored.manifest.name, restored.source) == (OLD, "remote")
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert str(NEW) in line and NOT_SIGNED in line
    assert "carries no signature" in line and "Unset the key" in line and "somebody else can write there" in line


def test_where_all_are_refused_there_is_no_fresh_start(
    local: PosixTier, remote: PosixTier, stranger: PosixTier
) -> None:
    for name in (OLD, NEW):
        commit_checkpoint(stranger, name)
    before = tree(remote.root)
    with pytest.raises(CorruptCheckpointError, match="2 checkpoints exist") as caught:
        restore(local, remote)
    assert str(caught.value).count(NOT_SIGNED) == 2
    assert tree(remote.root) == before


def test_a_stranger_on_the_local_disk_is_refused_as_well(local: PosixTier, remote: PosixTier) -> None:
    commit_checkpoint(remote, OLD)
    commit_checkpoint(PosixTier(local.root), NEW)
    restored = restore(local, remote)
    assert restored is not None and restored.manifest.name == OLD


def test_files_are_covered_by_the_digests_that_are_signed(local: PosixTier, remote: PosixTier) -> None:
    commit_checkpoint(remote, OLD)
    commit_checkpoint(remote, NEW)
    file = remote.path(f"{layout.checkpoint(NEW)}/checkpoint-20/model.bin")
    file.write_bytes(bytes(len(file.read_bytes())))
    restored = restore(local, remote)
    assert restored is not None and restored.manifest.name == OLD


def test_a_key_of_another_run_does_not_verify(tmp_path: Path, local: PosixTier) -> None:
    commit_checkpoint(tier_of(tmp_path / "remote", OTHER), NEW)
    with pytest.raises(CorruptCheckpointError, match="another key signed it"):
        restore(local, tier_of(tmp_path / "remote", KEY))


def test_a_checkpoint_of_another_run_with_the_same_key_does_not_verify(tmp_path: Path, local: PosixTier) -> None:
    commit_checkpoint(tier_of(tmp_path / "remote", KEY, run="other"), NEW)
    with pytest.raises(CorruptCheckpointError, match="copied from another run"):
        restore(local, tier_of(tmp_path / "remote", KEY))


def test_an_old_checkpoint_under_a_newer_name_does_not_verify(remote: PosixTier, stranger: PosixTier) -> None:
    commit_checkpoint(remote, OLD)
    newest = CheckpointName(1, 999)
    body = remote.read(layout.manifest(OLD)).replace(str(OLD).encode(), str(newest).encode())
    stranger.replace(layout.manifest(newest), body.replace(b'"step": 10', b'"step": 999'))
    with pytest.raises(CorruptCheckpointError, match=NOT_SIGNED):
        catalog.read_manifest(remote, newest)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a digest": lambda body: body["files"][0].update(digest="0" * 64),
    "a path": lambda body: body["files"][0].update(path="checkpoint-20/other.bin"),
    "a size": lambda body: body["files"][0].update(bytes=body["files"][0]["bytes"] + 1),
    "a file less": lambda body: body["files"].pop(),
    "the run": lambda body: body.update(run="other"),
    "the time": lambda body: body.update(created=2.0),
    "the best model": lambda body: body.update(pins=str(OLD)),
    "the frozen base": lambda body: body.update(base_fingerprint="0"),
    "a field more": lambda body: body.update(more=1),
    "no signature": lambda body: body.pop("signature"),
    "an empty signature": lambda body: body.update(signature=""),
    "a signature that is no text": lambda body: body.update(signature=[body["signature"]]),
    "a signature that is no ASCII": lambda body: body.update(signature="ä\ud800"),
    "another way to sign": lambda body: body.update(signature=body["signature"].replace("sha256", "sha1")),
    "one digit": lambda body: body.update(signature=body["signature"][:-1] + "x"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_in_a_signed_manifest_can_be_changed(remote: PosixTier, change: str) -> None:
    commit_checkpoint(remote, NEW)
    rewrite(remote, layout.manifest(NEW), CHANGES[change])
    with pytest.raises(CorruptCheckpointError, match=NOT_SIGNED):
        catalog.read_manifest(remote, NEW)


def test_the_same_content_in_another_spelling_verifies(remote: PosixTier) -> None:
    """Signed is what the JSON means, not its spaces."""
    manifest = commit_checkpoint(remote, NEW)
    rewrite(remote, layout.manifest(NEW), lambda body: None)
    assert catalog.read_manifest(remote, NEW) == manifest


@pytest.mark.parametrize("data", [b"", b"[]", b"7", b"null", b"\xff", b"[" * 100_000, b'{"signature": NaN}'])
def test_what_is_no_record_is_refused(remote: PosixTier, data: bytes) -> None:
    with pytest.raises(CorruptCheckpointError):
        remote.signing.check("manifests/x.json", data, remote.url)


# -- the end of training ---------------------------------------------------------------------------------------


def test_a_stranger_cannot_make_a_run_look_finished(
    remote: PosixTier, stranger: PosixTier, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (OLD, NEW):
        commit_checkpoint(remote, name)
    catalog.mark_complete(stranger, NEW, 20)
    assert catalog.completions(remote) == {}
    assert f"{NEW}.complete.json does not count as the end of training" in caplog.text and NOT_SIGNED in caplog.text


def test_the_end_of_training_is_signed(remote: PosixTier, stranger: PosixTier) -> None:
    commit_checkpoint(remote, NEW)
    catalog.mark_complete(remote, NEW, 20)
    assert catalog.completions(remote) == catalog.completions(stranger) == {NEW: 20}
    for change in (lambda body: body.update(max_steps=10), lambda body: body.pop("signature")):
        rewrite(remote, layout.completion(NEW), change)
        assert catalog.completions(remote) == {}


def test_the_end_of_another_checkpoint_does_not_verify(remote: PosixTier, stranger: PosixTier) -> None:
    for name in (OLD, NEW):
        commit_checkpoint(remote, name)
    catalog.mark_complete(remote, OLD, 20)
    stranger.create(layout.completion(NEW), remote.read(layout.completion(OLD)))
    assert catalog.completions(remote) == {OLD: 20}


# -- keys ------------------------------------------------------------------------------------------------------


def test_after_a_rotation_the_new_key_signs_and_both_verify(tmp_path: Path) -> None:
    commit_checkpoint(tier_of(tmp_path, OLD_KEY), OLD)
    rotated = tier_of(tmp_path, KEY, OLD_KEY)
    commit_checkpoint(rotated, NEW)
    assert [catalog.read_manifest(rotated, name).name for name in (OLD, NEW)] == [OLD, NEW]
    assert catalog.read_manifest(tier_of(tmp_path, KEY), NEW).name == NEW
    for keys, name in (((OLD_KEY,), NEW), ((KEY,), OLD)):
        with pytest.raises(CorruptCheckpointError, match="Add the earlier one to the key file"):
            catalog.read_manifest(tier_of(tmp_path, *keys), name)


def test_without_a_key_signed_checkpoints_are_read(local: PosixTier, remote: PosixTier, stranger: PosixTier) -> None:
    commit_checkpoint(remote, NEW)
    restored = restore(PosixTier(local.root), stranger)
    assert restored is not None and restored.manifest.is_signed
    commit_checkpoint(stranger, OLD)
    assert not catalog.read_manifest(stranger, OLD).is_signed


def test_without_a_key_nothing_is_signed(tmp_path: Path) -> None:
    manifest = commit_checkpoint(PosixTier(tmp_path), NEW)
    assert PosixTier(tmp_path).read(layout.manifest(NEW)) == manifest.to_json()
    assert b"signature" not in manifest.to_json()


def test_a_key_is_not_shown(local: PosixTier) -> None:
    assert KEY not in repr(local.signing)


# -- copies ----------------------------------------------------------------------------------------------------


def test_a_copy_keeps_its_signature_and_what_a_later_release_wrote(tmp_path: Path, local: PosixTier) -> None:
    """Local, remote, a new instance's local: the same bytes, whatever this release knows of them."""
    commit_checkpoint(PosixTier(local.root), NEW)
    body = json.loads(local.read(layout.manifest(NEW)))
    data = local.signing.signed(layout.manifest(NEW), json.dumps({**body, "of a later release": [1]}).encode())
    local.replace(layout.manifest(NEW), data)
    remote, new_local = tier_of(tmp_path / "remote", KEY), tier_of(tmp_path / "other", KEY)
    incarnation.claim(local, remote, 0.0)
    drain_all(make_drain(local, remote))
    assert restore(new_local, remote) is not None
    assert remote.read(layout.manifest(NEW)) == new_local.read(layout.manifest(NEW)) == data


def test_a_record_with_a_wrong_signature_is_not_signed_again(local: PosixTier) -> None:
    data = Signing("run", (OTHER,)).signed("manifests/x.json", b"{}")
    with pytest.raises(CorruptCheckpointError, match=NOT_SIGNED):
        local.signing.signed("manifests/x.json", data)


# -- the drain -------------------------------------------------------------------------------------------------


def test_an_unsigned_local_commit_is_not_drained(
    local: PosixTier, remote: PosixTier, caplog: pytest.LogCaptureFixture
) -> None:
    incarnation.claim(local, remote, 0.0)
    commit_checkpoint(local, OLD)
    commit_checkpoint(PosixTier(local.root), NEW)
    drain = make_drain(local, remote)
    drain_all(drain)
    assert catalog.names(remote) == [OLD] and drain.refused == {NEW}
    assert NOT_SIGNED in caplog.text


def test_a_stranger_cannot_have_real_checkpoints_deleted(
    local: PosixTier, remote: PosixTier, stranger: PosixTier
) -> None:
    """Newer names on the remote would make every real checkpoint look superseded."""
    incarnation.claim(local, remote, 0.0)
    commit_checkpoint(local, OLD)
    drain_all(make_drain(local, remote))
    for step in (1, 2, 3):
        commit_checkpoint(stranger, CheckpointName(999_999, step))
    commit_checkpoint(local, NEW)
    drain = make_drain(local, remote, keep_local=1, keep_remote=2)
    drain_all(drain)
    assert drain.durable == {OLD, NEW}
    assert {OLD, NEW} < set(catalog.names(remote))
    restored = restore(tier_of(local.root.with_name("new"), KEY), remote)
    assert restored is not None and restored.manifest.name == NEW


# -- a real store ----------------------------------------------------------------------------------------------


def test_signed_on_s3(tmp_path: Path, s3_server: S3Server) -> None:
    url = f"s3://{s3_server.new_bucket()}/team/run"
    local, remote = tier_of(tmp_path / "a", KEY), open_tier(url, s3_server.options, (KEY,))
    incarnation.claim(local, remote, 0.0)
    commit_checkpoint(local, OLD)
    catalog.mark_complete(local, OLD, 10)
    drain_all(make_drain(local, remote))
    assert remote.read(layout.manifest(OLD)) == local.read(layout.manifest(OLD))
    assert catalog.completions(remote) == {OLD: 10}
    stranger = open_tier(url, s3_server.options)
    unsigned = PosixTier(tmp_path / "stranger")
    manifest = commit_checkpoint(unsigned, NEW)
    for path in content_of(NEW):
        stranger.upload(
            unsigned.path(f"{layout.checkpoint(NEW)}/{path}"), f"{layout.checkpoint(NEW)}/{path}", lambda _: None
        )
    stranger.create(layout.manifest(NEW), manifest.to_json())
    restored = restore(tier_of(tmp_path / "b", KEY), remote)
    assert restored is not None and (restored.manifest.name, restored.source) == (OLD, "remote")
    without_key = restore(PosixTier(tmp_path / "c"), stranger)
    assert without_key is not None and without_key.manifest.name == NEW
