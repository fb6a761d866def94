"""What only S3 has to do of a tier: refusals told from empty listings, and writes whose reply was lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from spot_core.errors import CommitConflictError, CommitUnknownError, TierDeniedError, TierError
from spot_core.store.remote import FsspecTier
from tests.faultproxy import LOST_REPLY, FaultProxy
from tests.servers import RefusingServer, S3Server, free_port, s3_options


def test_a_missing_bucket_is_denied_and_not_empty(s3_server: S3Server, tmp_path: Path) -> None:
    tier = FsspecTier("s3://no-such-bucket/run", s3_server.options)
    (tmp_path / "source").write_bytes(b"content")
    for operation in (
        lambda: tier.list("manifests"),
        lambda: tier.read("run.json"),
        lambda: tier.record("run.json"),
        lambda: tier.create("run.json", b"content"),
        lambda: tier.replace("run.json", b"content"),
        lambda: tier.upload(tmp_path / "source", "run.json", lambda _: None),
        lambda: tier.download("run.json", tmp_path / "target", lambda _: None),
    ):
        with pytest.raises(TierDeniedError, match="no-such-bucket"):
            operation()


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"])
def test_a_refusal_is_denied_and_not_empty(code: str, tmp_path: Path) -> None:
    with RefusingServer(403, code) as server:
        tier = FsspecTier("s3://bucket/run", server.options)
        for operation in (
            lambda: tier.list("manifests"),
            lambda: tier.read("run.json"),
            lambda: tier.create("run.json", b"content"),
        ):
            with pytest.raises(TierDeniedError):
                operation()


@pytest.fixture(params=[False, True], ids=["not known to refuse", "known to refuse"])
def proxied(request: pytest.FixtureRequest, s3_server: S3Server, proxy: FaultProxy) -> FsspecTier:
    """Behind the proxy; whether the store keeps to conditions has been seen, or not."""
    tier = FsspecTier(f"s3://{s3_server.new_bucket()}/run", proxy.options)
    if request.param:
        tier.create("run.json", b"{}")
        assert tier.refuses_overwrite("run.json", b"{}")
    proxy.seen.clear()
    return tier


def test_what_was_taken_is_read_back_until_the_store_has_refused_once(
    proxied: FsspecTier, proxy: FaultProxy, request: pytest.FixtureRequest
) -> None:
    proxied.create("manifests/one.json", b"content")
    is_known = request.node.callspec.id == "known to refuse"
    assert [each.method for each in proxy.seen] == (["PUT"] if is_known else ["PUT", "GET"])
    proxied.create("manifests/one.json", b"content")
    with pytest.raises(CommitConflictError):
        proxied.create("manifests/one.json", b"another's")
    assert proxied.read("manifests/one.json") == b"content"


def _lose_the_first_put(proxy: FaultProxy) -> None:
    proxy.chooses = lambda request: LOST_REPLY if request.method == "PUT" and not proxy.fired else None


def test_a_create_whose_reply_was_lost_is_read_back_and_succeeds(proxied: FsspecTier, proxy: FaultProxy) -> None:
    """The client's own retry then meets the conflict with its first attempt."""
    _lose_the_first_put(proxy)
    proxied.create("manifests/one.json", b"content")
    assert len(proxy.fired) == 1
    assert proxied.read("manifests/one.json") == b"content"


def test_a_lost_reply_does_not_hide_that_another_writer_was_first(
    proxied: FsspecTier, s3_server: S3Server, proxy: FaultProxy
) -> None:
    FsspecTier(proxied.url, s3_server.options).create("manifests/one.json", b"another's")
    _lose_the_first_put(proxy)
    with pytest.raises(CommitConflictError):
        proxied.create("manifests/one.json", b"content")
    assert len(proxy.fired) == 1
    assert proxied.read("manifests/one.json") == b"another's"


def test_a_create_is_unknown_while_it_cannot_be_read_back(s3_server: S3Server, proxy: FaultProxy) -> None:
    tier = FsspecTier(f"s3://{s3_server.new_bucket()}/run", proxy.options)
    proxy.chooses = lambda request: LOST_REPLY
    with pytest.raises(CommitUnknownError, match=r"one\.json"):
        tier.create("manifests/one.json", b"content")
    proxy.chooses = lambda request: None
    tier.create("manifests/one.json", b"content")
    assert tier.read("manifests/one.json") == b"content"


def test_a_server_that_is_not_there_is_a_tier_error_to_be_retried(tmp_path: Path) -> None:
    tier = FsspecTier("s3://bucket/run", s3_options(free_port()))
    for operation in (lambda: tier.list("manifests"), lambda: tier.read("run.json")):
        with pytest.raises(TierError) as caught:
            operation()
        assert not isinstance(caught.value, TierDeniedError)
