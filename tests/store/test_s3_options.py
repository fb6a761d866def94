"""What a user can say about S3 arrives in the requests, by argument and by environment alike."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spot_core.config import SpotConfig
from spot_core.environment import STORAGE_OPTIONS
from spot_core.errors import ConfigError, TierDeniedError, TierError
from spot_core.store import layout
from spot_core.store.layout import CheckpointName
from spot_core.store.remote import FsspecTier
from spot_core.store.s3_files import PART_BYTES
from tests.faultproxy import UNREACHABLE, FaultProxy, Request
from tests.servers import GivenS3Server, S3Server, TlsS3Server

NAME = CheckpointName(1, 10)
SMALL, LARGE = (f"{layout.checkpoint(NAME)}/{file}" for file in ("small.bin", "large.bin"))


@pytest.fixture
def proxy(lenient_server: S3Server) -> Any:
    """In front of a server that accepts options which not every server has."""
    with FaultProxy(lenient_server.port) as proxy:
        yield proxy


def by_argument(options: dict[str, Any], _: pytest.MonkeyPatch) -> dict[str, Any]:
    return dict(
        SpotConfig.resolve({"remote": "s3://b/run", "storage_options": options}, fallback_local="x").storage_options
    )


def by_environment(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv(STORAGE_OPTIONS, json.dumps(options))
    return dict(SpotConfig.resolve({"remote": "s3://b/run"}, fallback_local="x").storage_options)


@pytest.fixture(params=[by_argument, by_environment], ids=["argument", "environment"])
def given(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    return lambda options: request.param(options, monkeypatch)


def commit(tier: FsspecTier, tmp_path: Path) -> None:
    """What a drain writes: a small file, one in parts, the conditional manifest, the life's record."""
    for path, size in ((SMALL, 100), (LARGE, 2 * PART_BYTES + 5)):
        (tmp_path / "source").write_bytes(os.urandom(size))
        tier.upload(tmp_path / "source", path, lambda _: None)
        assert tier.record(path).bytes == size
    tier.create(layout.manifest(NAME), b"manifest")
    tier.replace(layout.life(1), b"life")


def begun_writes(proxy: FaultProxy) -> dict[str, Request]:
    """The requests that decide how an object is stored, by what they are for."""
    found = {}
    for request in proxy.seen:
        is_part = "partNumber=" in request.path
        if request.method == "PUT" and not is_part:
            found[request.path.partition("?")[0].partition("/run/")[2]] = request
        if request.method == "POST" and request.path.endswith("?uploads"):
            found["parts of " + request.path.partition("?")[0].partition("/run/")[2]] = request
    return found


@pytest.mark.parametrize(
    ("more", "headers"),
    [
        (
            {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "arn:aws:kms:eu-west-1:123456789012:key/one"},
            {
                "x-amz-server-side-encryption": "aws:kms",
                "x-amz-server-side-encryption-aws-kms-key-id": "arn:aws:kms:eu-west-1:123456789012:key/one",
            },
        ),
        ({"ServerSideEncryption": "AES256"}, {"x-amz-server-side-encryption": "AES256"}),
        ({"StorageClass": "STANDARD_IA"}, {"x-amz-storage-class": "STANDARD_IA"}),
        ({"StorageClass": "GLACIER_IR"}, {"x-amz-storage-class": "GLACIER_IR"}),
        ({"ACL": "bucket-owner-full-control"}, {"x-amz-acl": "bucket-owner-full-control"}),
        ({"Tagging": "team=nlp"}, {"x-amz-tagging": "team=nlp"}),
    ],
    ids=["KMS key", "AES256", "infrequent access", "instant archive", "ACL", "tags"],
)
def test_how_objects_are_stored_is_said_with_every_write(
    lenient_server: S3Server,
    proxy: FaultProxy,
    given: Callable[..., dict[str, Any]],
    more: dict[str, str],
    headers: dict[str, str],
    tmp_path: Path,
) -> None:
    options = given({**proxy.options, "s3_additional_kwargs": more})
    commit(FsspecTier(f"s3://{lenient_server.new_bucket()}/team/run", options), tmp_path)
    writes = begun_writes(proxy)
    assert writes.keys() == {SMALL, f"parts of {LARGE}", layout.manifest(NAME), layout.life(1)}
    assert "if-none-match" in writes[layout.manifest(NAME)].headers
    for what, request in writes.items():
        assert headers.items() <= request.headers.items(), what


def test_whoever_asks_pays(
    lenient_server: S3Server, proxy: FaultProxy, given: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    tier = FsspecTier(f"s3://{lenient_server.new_bucket()}/team/run", given({**proxy.options, "requester_pays": True}))
    commit(tier, tmp_path)
    tier.list(layout.MANIFESTS)
    tier.delete([layout.life(1)])
    assert {request.headers.get("x-amz-request-payer") for request in proxy.seen} == {"requester"}


def test_region_and_profile_sign_the_requests(
    lenient_server: S3Server,
    proxy: FaultProxy,
    given: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = lenient_server.new_bucket()
    (tmp_path / "credentials").write_text("[team]\naws_access_key_id = team-key\naws_secret_access_key = team-secret\n")
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    options = {"profile": "team", "endpoint_url": proxy.options["endpoint_url"]}
    tier = FsspecTier(f"s3://{bucket}/run", given({**options, "client_kwargs": {"region_name": "eu-central-1"}}))
    commit(tier, tmp_path)
    for request in proxy.seen:
        assert "Credential=team-key/" in request.headers["authorization"]
        assert "/eu-central-1/s3/" in request.headers["authorization"]


def test_an_endpoint_is_asked_by_path_unless_told_otherwise(
    lenient_server: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    bucket = lenient_server.new_bucket()
    commit(FsspecTier(f"s3://{bucket}/run", proxy.options), tmp_path)
    assert all(request.path.startswith(f"/{bucket}") for request in proxy.seen)


@pytest.mark.parametrize("path", ["run.json", SMALL])
def test_virtual_hosts_and_a_proxy_server(path: str, proxy: FaultProxy, tmp_path: Path) -> None:
    """What is asked of a proxy server names the whole address, for a record and for a file."""
    config = {"s3": {"addressing_style": "virtual"}, "proxies": {"http": proxy.options["endpoint_url"]}}
    options = {**proxy.options, "endpoint_url": "http://s3.example.internal", "config_kwargs": config}
    proxy.chooses = lambda request: UNREACHABLE
    tier = FsspecTier("s3://bucket/run", options)
    (tmp_path / "source").write_bytes(b"content")
    with pytest.raises(TierError):
        tier.upload(tmp_path / "source", path, lambda _: None) if path == SMALL else tier.read(path)
    assert proxy.seen
    assert all(request.path.startswith(f"http://bucket.s3.example.internal/run/{path}") for request in proxy.seen)


def test_a_certificate_of_an_authority_of_ones_own_is_trusted_only_if_named(tmp_path: Path) -> None:
    with TlsS3Server(tmp_path) as server:
        url = f"s3://{server.new_bucket()}/run"
        commit(FsspecTier(url, server.options), tmp_path)
        client = {name: value for name, value in server.options["client_kwargs"].items() if name != "verify"}
        distrustful = FsspecTier(url, {**server.options, "client_kwargs": client})
        with pytest.raises(TierError, match=r"(?i)certificate"):
            distrustful.read("run.json")
        with pytest.raises(TierError, match=r"(?i)certificate"):
            distrustful.upload(tmp_path / "source", SMALL, lambda _: None)


def test_whoever_has_no_keys_reads_without_a_signature(
    lenient_server: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    url = f"s3://{lenient_server.new_bucket()}/team/run"
    commit(FsspecTier(url, {**proxy.options, "s3_additional_kwargs": {"ACL": "public-read"}}), tmp_path)
    proxy.seen.clear()
    options = {name: value for name, value in proxy.options.items() if name not in {"key", "secret"}}
    anonymous = FsspecTier(url, {**options, "anon": True, "skip_instance_cache": True})
    assert anonymous.read(layout.life(1)) == b"life"
    assert anonymous.record(LARGE).bytes == 2 * PART_BYTES + 5
    assert len(proxy.seen) >= 4 and not any("authorization" in request.headers for request in proxy.seen)


def test_options_of_the_event_loops_client_alone_are_no_obstacle(lenient_server: S3Server, tmp_path: Path) -> None:
    config = {"connector_args": {"keepalive_timeout": 5}, "tcp_keepalive": True}
    options = {**lenient_server.options, "config_kwargs": config}
    commit(FsspecTier(f"s3://{lenient_server.new_bucket()}/team/run", options), tmp_path)


@pytest.mark.parametrize("storage_class", ["GLACIER", "DEEP_ARCHIVE"])
def test_a_class_that_is_not_readable_at_once_is_refused(storage_class: str) -> None:
    with pytest.raises(ConfigError, match=f"{storage_class} cannot be read at once.*Nothing was written"):
        FsspecTier("s3://bucket/run", {"s3_additional_kwargs": {"StorageClass": storage_class}})


def test_nobody_writes_without_credentials(s3_store: TlsS3Server | GivenS3Server) -> None:
    if not isinstance(s3_store, GivenS3Server):
        pytest.skip("this server checks no signatures")
    options = {name: value for name, value in s3_store.options.items() if name not in {"key", "secret"}}
    tier = FsspecTier(f"s3://{s3_store.new_bucket()}/run", {**options, "anon": True, "skip_instance_cache": True})
    with pytest.raises(TierDeniedError, match=r"AccessDenied|[Dd]enied"):
        tier.create("run.json", b"content")
