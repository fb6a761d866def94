"""What an S3 server says that it holds: a drain believes a checksum that the server computed, and nothing else."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spot_core.errors import CorruptCheckpointError, TierError
from spot_core.store import catalog, resume, s3_files
from spot_core.store.posix import PosixTier
from spot_core.store.remote import FsspecTier
from spot_core.store.s3_files import PART_BYTES
from spot_core.store.tier import digest_file
from spot_core.testing.checkpoints import commit_checkpoint
from tests.agent.draining import ONE, THREE, TWO, drain_all, make_drain
from tests.faultproxy import UNREACHABLE, Fault, FaultProxy, Request
from tests.servers import GivenS3Server, S3Server, TlsS3Server

PATH = "checkpoints/one/model.bin"
SIZES = [1, PART_BYTES, 2 * PART_BYTES + 5]


def behind(proxy: FaultProxy, server: S3Server) -> FsspecTier:
    return FsspecTier(f"s3://{server.new_bucket()}/run", {**proxy.options, "skip_instance_cache": True})


@pytest.fixture
def remote(s3_server: S3Server, proxy: FaultProxy) -> FsspecTier:
    return behind(proxy, s3_server)


@pytest.fixture
def careless(lenient_server: S3Server) -> Iterator[tuple[FsspecTier, FaultProxy]]:
    """A server that takes altered bytes as they are: it looks at no signature."""
    with FaultProxy(lenient_server.port) as proxy:
        yield behind(proxy, lenient_server), proxy


def make_source(folder: Path, size: int) -> Path:
    path = folder / "source"
    path.write_bytes(os.urandom(size))
    return path


def is_upload(request: Request) -> bool:
    return request.method == "PUT" and request.is_data


def downloads(proxy: FaultProxy) -> int:
    requests = (request for request in proxy.seen if request.method == "GET" and request.is_data)
    return sum("list-type" not in request.path for request in requests)


@pytest.mark.s3
@pytest.mark.parametrize("size", [0, *SIZES])
def test_the_store_attests_what_was_sent(remote: FsspecTier, tmp_path: Path, size: int) -> None:
    source = make_source(tmp_path, size)
    attested = remote.upload(source, PATH, lambda _: None)
    assert attested is not None and attested.path == PATH
    assert (attested.bytes, attested.digest) == (size, digest_file(source).digest)


@pytest.mark.parametrize("size", SIZES)
def test_bytes_altered_on_the_way_are_not_attested(
    careless: tuple[FsspecTier, FaultProxy], tmp_path: Path, size: int
) -> None:
    remote, proxy = careless
    source = make_source(tmp_path, size)
    assert remote.upload(source, f"{PATH}.before", lambda _: None) is not None
    proxy.chooses = lambda request: Fault(alters=True) if is_upload(request) and not proxy.fired else None
    assert remote.upload(source, PATH, lambda _: None) is None
    assert proxy.fired
    assert remote.record(PATH).digest != digest_file(source).digest
    assert remote.upload(source, PATH, lambda _: None) is not None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("etag", ["0" * 32, "d41d8cd98f00b204e9800998ecf8427e-1", "a-b-c"])
def test_an_etag_that_is_no_sum_of_the_bytes_attests_nothing(
    remote: FsspecTier, proxy: FaultProxy, tmp_path: Path, size: int, etag: str
) -> None:
    """As with keys of KMS."""
    proxy.chooses = lambda request: Fault(etag=etag) if request.method == "HEAD" else None
    source = make_source(tmp_path, size)
    assert remote.upload(source, PATH, lambda _: None) is None
    assert proxy.fired
    assert remote.record(PATH).digest == digest_file(source).digest


@pytest.mark.s3
def test_the_first_of_a_life_is_read_back_and_later_ones_are_attested(
    local: PosixTier, remote: FsspecTier, proxy: FaultProxy
) -> None:
    drain = make_drain(local, remote)
    manifest = commit_checkpoint(local, ONE)
    assert drain_all(drain) == [ONE]
    assert downloads(proxy) == sum(file.bytes > 0 for file in manifest.files)
    proxy.seen.clear()
    commit_checkpoint(local, TWO)
    assert drain_all(drain) == [TWO]
    assert downloads(proxy) == 0
    commit_checkpoint(local, THREE)
    assert drain_all(make_drain(local, remote)) == [THREE]
    assert downloads(proxy) > 0


def test_every_one_is_read_back_where_the_store_attests_nothing(
    local: PosixTier, remote: FsspecTier, proxy: FaultProxy
) -> None:
    proxy.chooses = lambda request: Fault(etag="0" * 32) if request.method == "HEAD" else None
    drain = make_drain(local, remote)
    for name in (ONE, TWO, THREE):
        proxy.seen.clear()
        manifest = commit_checkpoint(local, name)
        assert drain_all(drain) == [name]
        assert downloads(proxy) == sum(file.bytes > 0 for file in manifest.files)


def test_what_changed_on_the_way_is_not_committed_and_the_next_attempt_is(
    local: PosixTier, careless: tuple[FsspecTier, FaultProxy]
) -> None:
    remote, proxy = careless
    drain = make_drain(local, remote)
    commit_checkpoint(local, ONE)
    assert drain_all(drain) == [ONE]
    commit_checkpoint(local, TWO)
    # One of the files is empty, and has nothing that could be altered.
    proxy.chooses = lambda request: (
        Fault(alters=True) if is_upload(request) and "model.bin" in request.path and not proxy.fired else None
    )
    with pytest.raises(CorruptCheckpointError, match="digest of its manifest"):
        drain.step(lambda *_: None)
    assert catalog.names(remote) == [ONE]
    assert drain_all(drain) == [TWO]
    resume.verify(remote, catalog.read_manifest(remote, TWO))


# -- stores that refuse what was not signed --------------------------------------------------------------------

LARGE = 2 * PART_BYTES + 5


def is_attempt(request: Request) -> bool:
    """The part that is sent other than it was signed, to see whether it is refused."""
    return is_upload(request) and request.headers["content-length"] == str(len(s3_files._SIGNED))


@pytest.fixture
def strict(remote: FsspecTier, proxy: FaultProxy) -> FsspecTier:
    """Refuses it, as a store does that looks at signatures."""
    refusal = Fault(status=400, code="XAmzContentSHA256Mismatch")
    proxy.chooses = lambda request: refusal if is_attempt(request) else None
    return remote


@pytest.fixture
def summed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many bytes sums were taken here, each time."""
    counts: list[int] = []
    md5 = s3_files._md5
    monkeypatch.setattr(s3_files, "_md5", lambda data: (counts.append(len(data)), md5(data))[1])
    return counts


def test_a_store_that_refuses_what_was_not_signed_sums_the_parts_up(
    strict: FsspecTier, proxy: FaultProxy, tmp_path: Path, summed: list[int]
) -> None:
    source = make_source(tmp_path, LARGE)
    for path in (PATH, f"{PATH}.again"):
        attested = strict.upload(source, path, lambda _: None)
        assert attested is not None and (attested.bytes, attested.digest) == (LARGE, digest_file(source).digest)
        assert strict.record(path).digest == digest_file(source).digest
    assert summed == [3 * 16] * 2
    assert sum(map(is_attempt, proxy.seen)) == 1


def test_on_a_store_that_takes_it_the_sums_are_taken_here(
    careless: tuple[FsspecTier, FaultProxy], tmp_path: Path, summed: list[int]
) -> None:
    remote, proxy = careless
    source = make_source(tmp_path, LARGE)
    for path in (PATH, f"{PATH}.again"):
        assert remote.upload(source, path, lambda _: None) is not None
        assert remote.record(path).digest == digest_file(source).digest
    assert sum(summed) == 2 * (LARGE + 3 * 16)
    assert sum(map(is_attempt, proxy.seen)) == 1


def test_where_it_cannot_be_tried_the_sums_are_taken_here(
    remote: FsspecTier, proxy: FaultProxy, tmp_path: Path, summed: list[int]
) -> None:
    proxy.chooses = lambda request: UNREACHABLE if is_attempt(request) else None
    assert remote.upload(make_source(tmp_path, LARGE), PATH, lambda _: None) is not None
    assert proxy.fired and sum(summed) == LARGE + 3 * 16


@pytest.mark.parametrize("where", ["a part", "the whole"])
@pytest.mark.parametrize("etag", ["0" * 32, "no sum"])
def test_sums_of_the_store_that_do_not_fit_each_other_attest_nothing(
    strict: FsspecTier, proxy: FaultProxy, tmp_path: Path, where: str, etag: str
) -> None:
    source = make_source(tmp_path, LARGE)
    assert strict.upload(source, f"{PATH}.before", lambda _: None) is not None
    # The last part is told by its length.
    proxy.chooses = lambda request: (
        Fault(etag=etag)
        if (request.method == "HEAD" if where == "the whole" else request.headers.get("content-length") == "5")
        else None
    )
    if where == "the whole":
        assert strict.upload(source, PATH, lambda _: None) is None
    else:
        # The server finds that the list of parts names another one, or takes it: then nothing is attested.
        with contextlib.suppress(TierError):
            assert strict.upload(source, PATH, lambda _: None) is None
    assert proxy.fired


@pytest.mark.s3
def test_nothing_is_left_of_the_attempt(remote: FsspecTier, tmp_path: Path) -> None:
    assert remote.upload(make_source(tmp_path, LARGE), PATH, lambda _: None) is not None
    assert remote.bucket is not None and remote.bucket.unfinished_uploads(PATH) == []
    assert remote.size(PATH) == LARGE


@pytest.mark.s3
def test_a_store_that_looks_at_signatures_is_seen_to_do_so(
    s3_server: S3Server | GivenS3Server, proxy: FaultProxy, tmp_path: Path, summed: list[int]
) -> None:
    if not isinstance(s3_server, GivenS3Server):
        pytest.skip("this server checks no signatures")
    remote, source = behind(proxy, s3_server), make_source(tmp_path, LARGE)
    assert remote.upload(source, PATH, lambda _: None) is not None
    assert summed == [3 * 16]
    proxy.chooses = lambda request: Fault(alters=True) if is_upload(request) and not proxy.fired else None
    with pytest.raises(TierError, match="XAmzContentSHA256Mismatch"):
        remote.upload(source, f"{PATH}.altered", lambda _: None)
    proxy.chooses = lambda request: None
    assert remote.upload(source, f"{PATH}.altered", lambda _: None) is not None
    assert remote.record(f"{PATH}.altered").digest == digest_file(source).digest


def test_over_tls_it_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are not signed there: encryption protects them."""
    monkeypatch.delattr(s3_files.S3Files, "_try_altered")
    with TlsS3Server(tmp_path) as server:
        tier = FsspecTier(f"s3://{server.new_bucket()}/run", server.options)
        assert tier.upload(make_source(tmp_path, LARGE), PATH, lambda _: None) is not None


def test_while_one_part_is_slow_the_others_take_no_more_memory(
    remote: FsspecTier, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies: dict[int, bytearray] = {}
    read = s3_files._read_part

    def noted(*args: Any) -> bytearray:
        body = read(*args)
        bodies[id(body)] = body
        return body

    monkeypatch.setattr(s3_files, "_read_part", noted)

    def is_first(request: Request) -> bool:
        is_part_1 = re.search(r"partNumber=1(?![0-9])", request.path) is not None
        return is_upload(request) and is_part_1 and not is_attempt(request)

    proxy.chooses = lambda request: Fault(delay_s=8.0) if is_first(request) else None
    source = make_source(tmp_path, 2 * s3_files.PARALLEL_PARTS * PART_BYTES)
    attested = remote.upload(source, PATH, lambda _: None)
    assert attested is not None and attested.digest == digest_file(source).digest
    assert proxy.fired and len(bodies) <= s3_files.PARALLEL_PARTS
