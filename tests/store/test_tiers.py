"""The contract of tiers, for each tier there is, and what only one of them has to do."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from spot_core.errors import ConfigError, TierError
from spot_core.store import incarnation, layout, s3
from spot_core.store.posix import PosixTier
from spot_core.store.remote import FsspecTier
from spot_core.store.tier import Tier, digest_file, open_tier
from spot_core.testing.tier_contract import TierContract
from tests.servers import (
    GivenS3Server,
    OverwritingS3Server,
    TlsS3Server,
)
from tests.sftpserver import SftpServer


class TestPosixTier(TierContract):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Tier:
        return PosixTier(tmp_path / "tier")

    @pytest.fixture
    def other(self, tier: Tier) -> Tier:
        return PosixTier(tier.url)


class TestMemoryTier(TierContract):
    has_atomic_create = False
    why_not = "fsspec's memory file system looks for the name, then writes: nothing orders two threads in between"

    @pytest.fixture
    def tier(self) -> Tier:
        return FsspecTier(f"memory://{uuid.uuid4().hex}/run", {})

    @pytest.fixture
    def other(self, tier: Tier) -> Tier:
        return FsspecTier(tier.url, {"skip_instance_cache": True})


class TestS3Tier(TierContract):
    rounds = 4

    @pytest.fixture
    def tier(self, s3_store: TlsS3Server | GivenS3Server) -> Tier:
        return FsspecTier(f"s3://{s3_store.new_bucket()}/team/run", s3_store.options)

    @pytest.fixture
    def other(self, tier: Tier, s3_store: TlsS3Server | GivenS3Server) -> Tier:
        return FsspecTier(tier.url, {**s3_store.options, "skip_instance_cache": True})

    def test_multipart_uploads_leave_nothing_behind(self, tier: Tier, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.write_bytes(bytes(40 << 20))
        tier.upload(source, "checkpoints/one/model.bin", lambda _: None)
        assert isinstance(tier, FsspecTier)
        bucket = tier.url.removeprefix("s3://").partition("/")[0]
        assert not tier._fs.list_multipart_uploads(bucket)

    def test_a_listing_takes_the_pages_it_needs(self, tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(s3, "PAGE_KEYS", 2)
        whole = [f"{number}.json" for number in range(7)]
        for name in whole:
            tier.create(f"manifests/{name}", b"content")
        assert tier.list("manifests", most=5) == whole[:5]
        assert tier.list("manifests", after=whole[1], most=4) == whole[2:6]


class TestOverwritingS3Tier(TierContract):
    has_atomic_create = False
    why_not = "the server has no conditional writes: claims are checked by reading back instead"
    rounds = 4

    @pytest.fixture
    def tier(self, overwriting_server: OverwritingS3Server) -> Tier:
        return self._opened(f"s3://{overwriting_server.new_bucket()}/team/run", overwriting_server.options)

    @pytest.fixture
    def other(self, tier: Tier, overwriting_server: OverwritingS3Server) -> Tier:
        return self._opened(tier.url, {**overwriting_server.options, "skip_instance_cache": True})

    @staticmethod
    def _opened(url: str, options: dict[str, Any]) -> Tier:
        tier = FsspecTier(url, options)
        tier.create("probe", b"")
        assert not tier.refuses_overwrite("probe", b"")
        tier.delete(["probe"])
        return tier


class TestSftpTier(TierContract):
    has_atomic_create = False
    why_not = "SFTP knows no create-only write of a whole file: claims are checked by reading back instead"
    rounds = 4

    @pytest.fixture
    def tier(self, sftp_server: SftpServer) -> Tier:
        return self._opened(sftp_server.new_url(), sftp_server.options)

    @pytest.fixture
    def other(self, tier: Tier, sftp_server: SftpServer) -> Tier:
        return self._opened(tier.url, {**sftp_server.options, "skip_instance_cache": True})

    @staticmethod
    def _opened(url: str, options: dict[str, Any]) -> Tier:
        tier = FsspecTier(url, options)
        assert not tier.refuses_overwrite("run.json", b"")
        return tier


# -- PosixTier -----------------------------------------------------------------------------------------------


def test_a_torn_temporary_file_of_a_killed_process_is_not_listed_and_not_in_the_way(tmp_path: Path) -> None:
    tier = PosixTier(tmp_path)
    tier.create("manifests/one.json", b"content")
    for leftover in list(tmp_path.rglob("*")):
        if leftover.is_file():
            (leftover.parent / f".tmp-1-{leftover.name}").write_bytes(b"to")
    assert tier.list("manifests") == ["one.json"]
    tier.replace("manifests/one.json", b"other")
    assert tier.read("manifests/one.json") == b"other"


def test_a_process_killed_between_link_and_unlink_cannot_be_overwritten_through_its_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container every life may have the same process id, and so the same temporary names."""
    tier = PosixTier(tmp_path)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    tier.create("manifests/one.json", b"content")
    monkeypatch.undo()
    with pytest.raises(Exception, match="other content"):
        tier.create("manifests/one.json", b"OTHER")
    assert tier.read("manifests/one.json") == b"content"


def test_a_file_system_without_hard_links_still_creates_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    tier = PosixTier(tmp_path)
    tier.create("manifests/one.json", b"content")
    tier.create("manifests/one.json", b"content")
    with pytest.raises(Exception, match="other content"):
        tier.create("manifests/one.json", b"OTHER")
    assert tier.read("manifests/one.json") == b"content"


def test_a_folder_that_is_a_file_is_a_tier_error_and_not_an_empty_listing(tmp_path: Path) -> None:
    (tmp_path / "manifests").write_bytes(b"")
    with pytest.raises(TierError, match="manifests"):
        PosixTier(tmp_path).list("manifests")


def test_a_full_disk_is_a_tier_error_and_leaves_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    tier = PosixTier(tmp_path)
    monkeypatch.setattr("os.write", full)
    with pytest.raises(TierError, match="No space left"):
        tier.create("manifests/one.json", b"content")
    monkeypatch.undo()
    assert tier.list("manifests") == []
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# -- FsspecTier ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["s3://bucket/run*", "memory://bucket/run[1]", "s3://bucket/a?/run", "memory://*/run"])
def test_a_url_that_fsspec_would_expand_is_refused(url: str) -> None:
    """Deleting in `run*` would delete in every run that starts so."""
    with pytest.raises(ConfigError, match="wildcard"):
        open_tier(url)


@pytest.mark.parametrize("url", ["nosuchscheme://bucket/run", "s4://bucket/run"])
def test_an_unknown_scheme_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError, match=url.partition("://")[0]):
        open_tier(url)


@pytest.mark.parametrize(
    ("scheme", "module", "package"),
    [("gs", "gcsfs", "gcsfs"), ("az", "adlfs", "adlfs"), ("s3", "s3fs", "'spot-callbacks[s3]'")],
)
def test_a_scheme_whose_package_is_missing_names_the_package(scheme: str, module: str, package: str) -> None:
    script = f"""
import sys
sys.modules[{module!r}] = None  # importing it fails, as where it is not installed
from spot_core.store.tier import open_tier
open_tier("{scheme}://bucket/team/run")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert f"ConfigError: cannot open {scheme}://" in result.stderr
    assert f"install it with: pip install {package}. Nothing was read or written." in result.stderr


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    tier = open_tier(f"file://{tmp_path}/run")
    tier.create("run.json", b"content")
    assert isinstance(tier, PosixTier) and (tmp_path / "run" / "run.json").read_bytes() == b"content"


# -- file systems with folders -------------------------------------------------------------------------------


@pytest.mark.usefixtures("never_late")
def test_a_store_that_only_looks_before_it_writes_is_told_as_one_that_overwrites(
    sftp_server: SftpServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    waited: list[float] = []
    for url, options in ((sftp_server.new_url(), sftp_server.options), (f"memory://{uuid.uuid4().hex}/run", {})):
        tier = FsspecTier(url, options)
        assert incarnation.claim(PosixTier(tmp_path / url[:4]), tier, 0.0, wait=waited.append) == 1
        assert url in caplog.messages[-1] and "does not refuse to overwrite" in caplog.messages[-1]
    assert waited == [incarnation.SETTLE_S] * 2


@pytest.mark.usefixtures("never_late")
def test_a_claim_that_another_was_written_over_on_sftp_is_given_up(sftp_server: SftpServer, local: PosixTier) -> None:
    tier = FsspecTier(sftp_server.new_url(), sftp_server.options)
    another = FsspecTier(tier.url, sftp_server.options)

    def another_claims(_: float) -> None:
        if incarnation.newest(another) == 1:
            another.replace(layout.incarnation(1), b"another's")

    assert incarnation.claim(local, tier, 0.0, wait=another_claims) == 2
    assert tier.read(layout.incarnation(1)) == b"another's"


def test_a_record_that_was_cut_off_on_sftp_is_neither_listed_nor_in_the_way(sftp_server: SftpServer) -> None:
    """A file shows while it is written, so its first name is another one."""
    tier = FsspecTier(sftp_server.new_url(), sftp_server.options)
    tier.create("manifests/one.json", b"content")
    folder = tier._path("manifests")
    begun: list[str] = []
    pipe_file = tier._fs.pipe_file

    def cut_off(path: str, data: bytes, **more: Any) -> None:
        begun.append(path)
        pipe_file(path, data[:3], **more)
        raise KeyboardInterrupt

    tier._fs.pipe_file, rm_file = cut_off, tier._fs.rm_file
    tier._fs.rm_file = lambda path: None  # it died: nobody cleans up
    for mode in ("create", "overwrite"):
        with pytest.raises(KeyboardInterrupt):
            tier._write("manifests/two.json", b"content", mode)
    tier._fs.pipe_file, tier._fs.rm_file = pipe_file, rm_file
    assert len(begun) == 2 and len(tier._fs.ls(folder)) == 3
    assert tier.list("manifests") == ["one.json"]
    tier.create("manifests/two.json", b"content")
    assert tier.list("manifests") == ["one.json", "two.json"]


def test_a_server_that_was_down_for_a_while_is_found_again_over_sftp(tmp_path: Path) -> None:
    server = SftpServer(tmp_path)
    source = tmp_path / "source"
    source.write_bytes(b"content" * 1000)
    with server:
        tier = FsspecTier(server.new_url(), server.options)
        tier.create("manifests/one.json", b"content")
    for operation in (lambda: tier.list("manifests"), lambda: tier.upload(source, "model.bin", lambda _: None)):
        with pytest.raises(TierError):
            operation()
    with server:
        tier.upload(source, "model.bin", lambda _: None)
        assert tier.record("model.bin").digest == digest_file(source).digest
        assert tier.list("manifests") == ["one.json"]
