"""S3 in trouble: what the tier rides out, what it cleans up, and what it tells."""

from __future__ import annotations

import filecmp
import logging
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spot_core.errors import TierDeniedError, TierError
from spot_core.store import layout, s3
from spot_core.store.layout import CheckpointName
from spot_core.store.remote import FsspecTier
from spot_core.store.s3 import CHECKSUM, with_defaults
from spot_core.store.s3_files import PART_BYTES
from spot_core.store.tier import digest_file
from tests.faultproxy import LOST_REPLY, SLOW_DOWN, UNREACHABLE, Fault, FaultProxy, Request
from tests.servers import S3Server, TlsS3Server

PATH = f"{layout.checkpoint(CheckpointName(1, 10))}/model.bin"


@pytest.fixture
def tier(s3_server: S3Server, proxy: FaultProxy) -> FsspecTier:
    """A tier behind the proxy that has been reached once."""
    tier = FsspecTier(f"s3://{s3_server.new_bucket()}/team/run", {**proxy.options, "skip_instance_cache": True})
    assert tier.list("manifests") == []
    return tier


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of three parts."""
    path = tmp_path / "source"
    path.write_bytes(os.urandom(2 * PART_BYTES + 5))
    return path


def first(proxy: FaultProxy, count: int, fault: Fault, matches: Callable[[Request], bool] = lambda _: True) -> None:
    """Spoil the first `count` requests that match."""
    proxy.chooses = lambda request: fault if len(proxy.fired) < count and matches(request) else None


def uploads_of(tier: FsspecTier) -> list[str]:
    bucket = tier.url.removeprefix("s3://").partition("/")[0]
    return [upload["Key"] for upload in tier._fs.list_multipart_uploads(bucket)]


# -- ridden out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [SLOW_DOWN, UNREACHABLE, Fault(status=500)])
def test_a_short_outage_is_not_noticed(tier: FsspecTier, proxy: FaultProxy, fault: Fault) -> None:
    first(proxy, 4, fault)
    tier.create("manifests/one.json", b"content")
    first(proxy, 7, fault)
    assert tier.record("manifests/one.json").bytes == 7
    assert len(proxy.fired) == 7
    assert tier.list("manifests") == ["one.json"]


def test_before_the_store_answered_once_it_is_given_up_soon(s3_server: S3Server, proxy: FaultProxy) -> None:
    """The address may be wrong, and whoever opens the run counts the time."""
    tier = FsspecTier(f"s3://{s3_server.new_bucket()}/run", {**proxy.options, "skip_instance_cache": True})
    first(proxy, 1000, UNREACHABLE)
    with pytest.raises(TierError):
        tier.list("manifests")
    assert len(proxy.fired) <= 4


@pytest.mark.parametrize("size", [3000, 2 * PART_BYTES + 5])
def test_a_reset_in_the_middle_of_a_download_is_not_noticed(
    tier: FsspecTier, proxy: FaultProxy, tmp_path: Path, source: Path, size: int
) -> None:
    os.truncate(source, size)
    tier.upload(source, PATH, lambda _: None)
    first(proxy, 2, Fault(reset_after_bytes=1000), lambda request: request.method == "GET" and request.is_data)
    got: list[int] = []
    tier.download(PATH, tmp_path / "target", got.append)
    assert len(proxy.fired) == 2
    assert filecmp.cmp(source, tmp_path / "target", shallow=False)
    assert sum(got) == size
    proxy.fired.clear()
    assert tier.record(PATH).digest == digest_file(source).digest
    assert len(proxy.fired) == 2


def test_a_lost_reply_to_the_completion_of_an_upload_is_looked_up(
    tier: FsspecTier, proxy: FaultProxy, source: Path
) -> None:
    """Its repetition is told that there is no such upload."""
    first(proxy, 1, LOST_REPLY, lambda request: request.method == "POST" and "uploadId" in request.path)
    sent: list[int] = []
    tier.upload(source, PATH, sent.append)
    assert len(proxy.fired) == 1
    assert tier.record(PATH).digest == digest_file(source).digest
    assert sum(sent) == source.stat().st_size
    assert uploads_of(tier) == []


def test_an_upload_tells_of_each_part(tier: FsspecTier, source: Path) -> None:
    sent: list[int] = []
    tier.upload(source, PATH, sent.append)
    assert sent == [PART_BYTES, PART_BYTES, 5]


def test_a_fifth_of_all_requests_failing_changes_nothing(tier: FsspecTier, proxy: FaultProxy, source: Path) -> None:
    draw = random.Random(0)
    faults = [SLOW_DOWN, UNREACHABLE, LOST_REPLY, Fault(status=500), Fault(status=503, code="ServiceUnavailable")]
    proxy.chooses = lambda _: draw.choice(faults) if draw.random() < 0.2 else None
    tier.upload(source, PATH, lambda _: None)
    for number in range(20):
        tier.create(f"manifests/{number}.json", b"content")
    assert len(proxy.fired) > 3
    assert tier.record(PATH).digest == digest_file(source).digest
    assert len(tier.list("manifests")) == 20


# -- credentials -------------------------------------------------------------------------------------------------


def _credentials(folder: Path, key: str) -> None:
    (folder / "credentials").write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret-{key}\n")


@pytest.fixture
def lenient_proxy(lenient_server: S3Server) -> Iterator[FaultProxy]:
    """In front of a server that takes any credentials."""
    with FaultProxy(lenient_server.port) as proxy:
        yield proxy


@pytest.fixture
def profile_tier(
    lenient_server: S3Server, lenient_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> FsspecTier:
    """Credentials from a file, as a machine's role renews them."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    _credentials(tmp_path, "old")
    options: dict[str, Any] = {**lenient_proxy.options, "skip_instance_cache": True}
    tier = FsspecTier(
        f"s3://{lenient_server.new_bucket()}/run", {k: v for k, v in options.items() if k not in {"key", "secret"}}
    )
    assert tier.list("manifests") == []
    return tier


def _expire_old(proxy: FaultProxy) -> None:
    expired = Fault(status=400, code="ExpiredToken")
    proxy.chooses = lambda request: expired if "Credential=old/" in request.headers["authorization"] else None


def test_expired_credentials_are_renewed_in_the_middle_of_anything(
    profile_tier: FsspecTier, lenient_proxy: FaultProxy, tmp_path: Path, source: Path
) -> None:
    operations: list[Callable[[], Any]] = [
        lambda: profile_tier.upload(source, PATH, sent.append),
        lambda: profile_tier.create("manifests/one.json", b"content"),
        lambda: profile_tier.download(PATH, tmp_path / "target", lambda _: None),
        lambda: profile_tier.list("manifests"),
        lambda: profile_tier.delete(["manifests/one.json"]),
    ]
    sent: list[int] = []
    for operation in operations:
        _credentials(tmp_path, "old")
        profile_tier._fs.connect(refresh=True)
        _credentials(tmp_path, "new")
        _expire_old(lenient_proxy)
        count = len(lenient_proxy.fired)
        operation()
        assert len(lenient_proxy.fired) > count
    assert sum(sent) == source.stat().st_size
    assert filecmp.cmp(source, tmp_path / "target", shallow=False)
    assert profile_tier.list("manifests") == []


def test_credentials_that_stay_expired_are_tried_once_more_and_not_shown(
    profile_tier: FsspecTier, lenient_proxy: FaultProxy
) -> None:
    _expire_old(lenient_proxy)
    with pytest.raises(TierDeniedError) as caught:
        profile_tier.read("run.json")
    assert "secret-old" not in str(caught.value)
    assert len(lenient_proxy.fired) <= 4  # looks for the size, then reads, each with the old and the renewed ones


# -- unfinished uploads ------------------------------------------------------------------------------------------


def test_a_failed_upload_is_aborted_and_no_other(tier: FsspecTier, proxy: FaultProxy, source: Path) -> None:
    bucket = tier.url.removeprefix("s3://").partition("/")[0]
    tier._fs.call_s3("create_multipart_upload", Bucket=bucket, Key="another/file")
    first(proxy, 1, Fault(status=403, code="AccessDenied"), lambda request: "partNumber=3" in request.path)
    with pytest.raises(TierDeniedError):
        tier.upload(source, PATH, lambda _: None)
    assert len(proxy.fired) == 1
    assert uploads_of(tier) == ["another/file"]


def test_a_new_life_aborts_what_earlier_lives_of_this_run_left_and_nothing_else(
    tier: FsspecTier, proxy: FaultProxy
) -> None:
    bucket, _, root = tier.url.removeprefix("s3://").partition("/")
    own, older = (layout.checkpoint(CheckpointName(number, 10)) for number in (3, 2))
    stay = [f"{root}/{own}/a", f"{root}-2/{older}/a", f"{root}/other/{older}/a", f"{root}/checkpoints/mine/a", "a"]
    for key in (f"{root}/{older}/a", f"{root}/{older}/deep/b", *stay):
        tier._fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    assert tier.sweep_uploads(before_incarnation=3) == 2
    assert sorted(uploads_of(tier)) == sorted(stay)


def test_an_upload_that_has_ended_already_keeps_no_other_from_being_aborted(
    tier: FsspecTier, proxy: FaultProxy
) -> None:
    assert tier.bucket is not None
    for name in ("a", "b"):
        tier.bucket.begin_upload(f"{layout.checkpoint(CheckpointName(2, 10))}/{name}")
    first(proxy, 1, LOST_REPLY, lambda request: request.method == "DELETE")
    assert tier.sweep_uploads(before_incarnation=3) == 2
    assert len(proxy.fired) == 1 and uploads_of(tier) == []


def test_a_store_that_does_not_list_uploads_is_told_quietly(
    tier: FsspecTier, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    first(proxy, 9, Fault(status=403, code="AccessDenied"))
    with caplog.at_level(logging.INFO):
        assert tier.sweep_uploads(before_incarnation=3) == 0
    assert [record.levelname for record in caplog.records if "ListBucketMultipartUploads" in record.message] == ["INFO"]


# -- deleting ----------------------------------------------------------------------------------------------------

KEPT = "<?xml version='1.0'?><DeleteResult><Error><Key>team/run/a/b</Key><Code>{}</Code></Error></DeleteResult>"


@pytest.mark.parametrize(("code", "kind"), [("AccessDenied", TierDeniedError), ("InternalError", TierError)])
def test_a_store_that_keeps_single_files_is_heard(
    tier: FsspecTier, proxy: FaultProxy, code: str, kind: type[TierError]
) -> None:
    """A policy or an object lock: the answer is 200, and names in its body what was not deleted."""
    tier.create("a/b", b"1")
    proxy.chooses = lambda request: Fault(status=200, body=KEPT.format(code)) if "?delete" in request.path else None
    with pytest.raises(TierError, match=f"{code}: team/run/a/b") as caught:
        tier.delete(["a"])
    assert type(caught.value) is kind
    proxy.chooses = lambda request: None
    assert tier.read("a/b") == b"1"


def test_a_folder_of_more_files_than_one_request_takes_is_deleted_whole_and_nothing_beside_it(
    tier: FsspecTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_KEYS_AT_ONCE", 3)
    for name in (*(f"a/{number}" for number in range(7)), "a2/0", "b"):
        tier.create(name, b"1")
    tier.delete(["a", "b", "not-there"])
    assert (tier.list(""), tier.list("a"), tier.list("a2")) == (["a2"], [], ["0"])


# -- checksums and options ---------------------------------------------------------------------------------------


def test_uploads_over_tls_carry_a_checksum_and_the_users_options_win() -> None:
    pytest.importorskip("awscrt")
    aws, tls = with_defaults({}), with_defaults({"endpoint_url": "https://host"})
    assert aws["s3_additional_kwargs"] == tls["s3_additional_kwargs"] == {"ChecksumAlgorithm": CHECKSUM}
    assert with_defaults({"endpoint_url": "http://host"})["s3_additional_kwargs"] == {}
    given = {"s3_additional_kwargs": {"StorageClass": "STANDARD_IA", "ChecksumAlgorithm": None}, "use_ssl": True}
    assert with_defaults(given)["s3_additional_kwargs"] == {"StorageClass": "STANDARD_IA"}
    config = with_defaults({"config_kwargs": {"read_timeout": 7}})["config_kwargs"]
    assert (config["read_timeout"], config["connect_timeout"]) == (7, 5)


def test_uploads_over_tls_arrive_with_their_checksum(tmp_path: Path, source: Path) -> None:
    pytest.importorskip("awscrt")
    with TlsS3Server(tmp_path) as server:
        tier = FsspecTier(f"s3://{server.new_bucket()}/run", server.options)
        tier.upload(source, PATH, lambda _: None)
        tier.create("manifests/one.json", b"content")
        assert tier._fs.s3_additional_kwargs == {"ChecksumAlgorithm": CHECKSUM}
        assert tier.record(PATH).digest == digest_file(source).digest
        bucket, _, root = tier.url.removeprefix("s3://").partition("/")
        head = tier._fs.call_s3("head_object", Bucket=bucket, Key=f"{root}/manifests/one.json", ChecksumMode="ENABLED")
        assert head.get(f"Checksum{CHECKSUM}")


def test_a_store_that_does_not_know_the_checksum_is_written_to_without(
    tier: FsspecTier, proxy: FaultProxy, source: Path
) -> None:
    pytest.importorskip("awscrt")
    tier._fs.s3_additional_kwargs["ChecksumAlgorithm"] = CHECKSUM
    unknown = Fault(status=400, code="InvalidRequest")
    proxy.chooses = lambda request: (
        unknown if any("crc64nvme" in value.lower() for value in request.headers.values()) else None
    )
    tier.upload(source, PATH, lambda _: None)
    assert len(proxy.fired) == 1
    assert tier.record(PATH).digest == digest_file(source).digest
