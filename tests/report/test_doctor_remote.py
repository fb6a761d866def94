"""`spot doctor` and the remote: each operation is tried, what is refused is named with its fix, nothing stays."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from spot_core.environment import STORAGE_OPTIONS
from spot_core.report.checks.remote import RemoteProbe
from spot_core.store.posix import PosixTier
from spot_core.store.tier import open_tier
from tests.disk import mounted
from tests.faultproxy import HANG, Fault, FaultProxy, Request
from tests.report.conftest import start_spot
from tests.report.examined import Examine, found, names_in, probed, statuses
from tests.report.stored import BuiltRun
from tests.servers import OverwritingS3Server, RefusingServer, S3Server, s3_options
from tests.sftpserver import SftpServer

ALL_S3 = (
    "list",
    "write",
    "read",
    "create",
    "conditional write",
    "replace",
    "upload",
    "begin upload",
    "list uploads",
    "abort upload",
    "delete",
)
ALL = tuple(what for what in ALL_S3 if not what.endswith(" upload") and what != "list uploads")
DENIED = Fault(status=403, code="AccessDenied")
MB_IN_PARTS = 40  # three parts


class Bucket:
    """One of a server, to look at behind the back of what is tested."""

    def __init__(self, server: S3Server | OverwritingS3Server) -> None:
        self.name = server.new_bucket()
        self.url = f"s3://{self.name}/team/alpaca"
        self._fs = fsspec.filesystem("s3", **server.options, use_listings_cache=False)

    def content(self) -> dict[str, Any]:
        """Every object, by when it was written and its hash, and uploads that have not ended."""
        objects = {
            path: (info["ETag"], info["LastModified"]) for path, info in self._fs.find(self.name, detail=True).items()
        }
        return {**objects, "uploads": self._fs.call_s3("list_multipart_uploads", Bucket=self.name).get("Uploads", [])}


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setenv(STORAGE_OPTIONS, json.dumps(s3_server.options))
    return Bucket(s3_server)


@pytest.fixture
def proxied(proxy: FaultProxy, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket that `spot` reaches through the proxy."""
    monkeypatch.setenv(STORAGE_OPTIONS, json.dumps(proxy.options))
    return Bucket(s3_server)


# -- a store that works ------------------------------------------------------------------------------------------


def test_a_bucket_that_is_new_passes_and_stays_empty(bucket: Bucket, doctor: Examine) -> None:
    result = doctor("--state-mb", MB_IN_PARTS, remote=bucket.url)
    assert statuses(result, "remote") == dict.fromkeys(ALL_S3, "ok"), result.out
    upload = found(result)["remote", "upload"]
    assert upload["measured"]["upload_bytes_per_s"] > 0
    assert "the store attests what it holds" in upload["detail"]
    assert statuses(result, "clock") == {"skew": "ok"}
    assert bucket.content() == {"uploads": []}


def test_a_run_in_use_in_a_bucket_is_left_as_it_is(
    bucket: Bucket, doctor: Examine, s3_server: S3Server, tmp_path: Path
) -> None:
    run = BuiltRun(tmp_path / "nvme" / "alpaca", open_tier(bucket.url, s3_server.options))
    run.live(steps=(0, 10))
    run.commit(10, ballast=1 << 20)
    run.drain()
    before = bucket.content(), names_in(tmp_path)
    assert doctor(remote=bucket.url).code == 0
    assert (bucket.content(), names_in(tmp_path)) == before


def test_everything_is_written_below_one_name_in_the_folder_of_the_run(
    proxied: Bucket, proxy: FaultProxy, doctor: Examine
) -> None:
    assert doctor(remote=proxied.url).code == 0
    written = [request.path for request in proxy.seen if request.method == "PUT"]
    (scratch,) = {path.split("/")[4] for path in written}
    assert all(path.startswith(f"/{proxied.name}/team/alpaca/doctor-") for path in written)
    posted = [request.path for request in proxy.seen if request.method == "POST" and "delete" not in request.path]
    assert posted and all(scratch in path for path in posted)


def test_sftp_passes_but_for_conditional_writes_and_no_folder_stays(
    sftp_server: SftpServer, doctor: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORAGE_OPTIONS, json.dumps(sftp_server.options))
    url = sftp_server.new_url()
    result = doctor(remote=url)
    wanted = {**dict.fromkeys((*ALL, "upload"), "ok"), "conditional write": "warning"}
    assert statuses(result, "remote") == wanted, result.out
    detail = found(result)["remote", "upload"]["detail"]
    assert "read back whole" in detail and "every checkpoint" in detail
    fs = fsspec.filesystem("sftp", host="127.0.0.1", port=sftp_server.port, **sftp_server.options)
    top = f"/{url.split('/')[3]}"
    assert not fs.exists(top)

    fs.makedirs(f"{top}/team")
    assert doctor(remote=url).code == 0
    assert fs.ls(f"{top}/team", detail=False) == [], "what was there stays, and only that"


def test_a_store_that_overwrites_is_a_warning(
    overwriting_server: OverwritingS3Server, doctor: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORAGE_OPTIONS, json.dumps(overwriting_server.options))
    bucket = Bucket(overwriting_server)
    result = doctor(remote=bucket.url)
    told = found(result)["remote", "conditional write"]
    assert (result.code, told["status"]) == (0, "warning")
    assert "does not refuse to overwrite" in told["detail"]
    assert "If-None-Match" in told["fix"]
    assert statuses(result, "remote")["delete"] == "ok"
    assert bucket.content() == {"uploads": []}


def test_what_a_killed_check_left_is_named_and_stays(doctor: Examine, tmp_path: Path) -> None:
    left = tmp_path / "bucket" / "alpaca" / "doctor-0123456789ab" / "record.json"
    left.parent.mkdir(parents=True)
    left.write_text("{}")
    result = doctor()
    told = found(result)["remote", "list"]
    assert (result.code, told["status"]) == (0, "warning")
    assert "doctor-0123456789ab" in told["detail"]
    assert [path.name for path in (tmp_path / "bucket" / "alpaca").iterdir()] == ["doctor-0123456789ab"]


# -- what is refused ---------------------------------------------------------------------------------------------


OF_BUCKET, OF_RUN = "arn:aws:s3:::{name}", "arn:aws:s3:::{name}/team/alpaca/*"


def is_deletion(request: Request) -> bool:
    return "?delete" in request.path or (request.method == "DELETE" and "uploadId=" not in request.path)


# What is denied, what is told as what, and the resource.
REFUSALS: dict[str, tuple[str, Callable[[Request], bool], str, str]] = {
    "s3:ListBucket": (
        "list",
        lambda r: r.method == "GET" and "list-type=2" in r.path,
        "problem",
        OF_BUCKET,
    ),
    "s3:PutObject": (
        "write",
        lambda r: r.method == "PUT" and "record.json" in r.path,
        "problem",
        OF_RUN,
    ),
    "s3:GetObject": (
        "read",
        lambda r: r.method in {"GET", "HEAD"} and "record.json" in r.path,
        "problem",
        OF_RUN,
    ),
    "s3:ListBucketMultipartUploads": (
        "list uploads",
        lambda r: r.method == "GET" and "uploads" in r.path,
        "warning",
        OF_BUCKET,
    ),
    "s3:AbortMultipartUpload": (
        "abort upload",
        lambda r: r.method == "DELETE" and "uploadId=" in r.path,
        "warning",
        OF_RUN,
    ),
    "s3:DeleteObject": (
        "delete",
        is_deletion,
        "problem",
        OF_RUN,
    ),
}


@pytest.mark.parametrize("permission", REFUSALS)
def test_a_permission_that_is_missing_is_named(
    permission: str, proxied: Bucket, proxy: FaultProxy, doctor: Examine
) -> None:
    what, is_denied, status, resource = REFUSALS[permission]
    proxy.chooses = lambda request: DENIED if is_denied(request) else None
    result = doctor(remote=proxied.url)
    told = found(result)["remote", what]
    assert (told["status"], result.code) == (status, 1 if status == "problem" else 0), result.out
    assert f"allow {permission} on {resource.format(name=proxied.name)}" in told["fix"]
    assert proxy.fired
    proxy.chooses = lambda _: None
    if permission != "s3:DeleteObject":
        assert proxied.content() == {"uploads": []}


def test_what_cannot_be_deleted_is_named_to_be_deleted_by_hand(
    proxied: Bucket, proxy: FaultProxy, doctor: Examine
) -> None:
    proxy.chooses = lambda request: DENIED if is_deletion(request) else None
    result = doctor(remote=proxied.url)
    (left,) = {path.split("/")[3] for path in proxied.content() if "doctor-" in path}
    assert statuses(result, "remote")["upload"] == "skipped", "nothing large is left"
    assert f"{proxied.url}/{left} may be left" in found(result)["remote", "clean up"]["detail"]


def test_every_refusal_of_a_store_that_refuses_all_is_named(doctor: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    with RefusingServer(403, "AccessDenied") as server:
        monkeypatch.setenv(STORAGE_OPTIONS, json.dumps(server.options))
        result = doctor(remote="s3://bucket/run")
    told = {each["fix"].split()[1] for (area, _), each in found(result).items() if area == "remote" and each["fix"]}
    assert result.code == 1
    assert told == {"s3:ListBucket", "s3:PutObject", "s3:GetObject", "s3:ListBucketMultipartUploads"}
    assert ("remote", "clean up") not in found(result)


@pytest.mark.parametrize(
    ("status", "code", "fix"),
    [
        (403, "InvalidAccessKeyId", "AWS_PROFILE"),
        (403, "SignatureDoesNotMatch", "the secret is not that of the key"),
        (400, "ExpiredToken", "the credentials have expired"),
        (403, "RequestTimeTooSkewed", "clock by NTP"),
        (400, "AuthorizationHeaderMalformed", "AWS_DEFAULT_REGION"),
        (404, "Not Found", "check the network, the URL, the endpoint"),
    ],
)
def test_a_refusal_of_who_asks_says_what_to_change_and_nothing_else_is_tried(
    status: int, code: str, fix: str, doctor: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RefusingServer(status, code) as server:
        monkeypatch.setenv(STORAGE_OPTIONS, json.dumps(server.options))
        result = doctor(remote="s3://bucket/run")
    assert (result.code, statuses(result, "remote")) == (1, {"list": "problem"})
    assert fix in found(result)["remote", "list"]["fix"]


def test_credentials_that_are_missing_are_told(
    s3_server: S3Server, doctor: Examine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    options = {name: value for name, value in s3_server.options.items() if name not in {"key", "secret"}}
    # One that was made before would still have them.
    monkeypatch.setenv(STORAGE_OPTIONS, json.dumps({**options, "skip_instance_cache": True}))
    result = doctor(remote="s3://bucket/run")
    assert (result.code, statuses(result, "remote")) == (1, {"list": "problem"})
    assert "AWS_ACCESS_KEY_ID" in found(result)["remote", "list"]["fix"]


def test_a_bucket_that_does_not_exist_is_told(bucket: Bucket, doctor: Examine) -> None:
    result = doctor(remote="s3://no-such-bucket-here/run")
    assert (result.code, statuses(result, "remote")) == (1, {"list": "problem"})
    assert found(result)["remote", "list"]["fix"] == "make the bucket, or correct the URL"


def test_a_remote_folder_that_may_not_be_written_is_told(doctor: Examine, tmp_path: Path) -> None:
    with mounted(tmp_path / "share", "ro") as share:
        result = doctor(remote=share / "alpaca")
    told = found(result)["remote", "write"]
    assert (result.code, told["status"]) == (1, "problem")
    assert "Read-only file system" in told["detail"]
    assert told["fix"] == f"let this user list, read, write and delete in {tmp_path}/share/alpaca"


# -- a store that does not answer, or lies -----------------------------------------------------------------------


def test_a_store_where_nothing_listens_is_told(doctor: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STORAGE_OPTIONS, json.dumps(s3_options(1)))
    result = doctor(remote="s3://bucket/run")
    assert (result.code, statuses(result, "remote")) == (1, {"list": "problem"})
    assert "check the network" in found(result)["remote", "list"]["fix"]
    assert statuses(result, "clock") == {"skew": "skipped"}


def test_a_store_that_hangs_is_not_waited_for(proxied: Bucket, proxy: FaultProxy) -> None:
    proxy.chooses = lambda _: HANG
    told = probed(RemoteProbe(open_tier(proxied.url, proxy.options), patience_s=0.5))
    assert {what: each.status for what, each in told.items()} == {"list": "problem"}
    assert "no answer within" in told["list"].detail


def test_a_store_that_hangs_in_the_middle_is_not_waited_for_and_is_cleaned(proxied: Bucket, proxy: FaultProxy) -> None:
    proxy.chooses = lambda request: HANG if request.method == "GET" and "record.json" in request.path else None
    told = probed(RemoteProbe(open_tier(proxied.url, proxy.options), patience_s=5.0))
    assert told["read"].status == "problem"
    assert "conditional write" not in told and "clean up" not in told
    assert proxied.content() == {"uploads": []}


def test_an_upload_that_breaks_leaves_no_part_behind(proxied: Bucket, proxy: FaultProxy, doctor: Examine) -> None:
    proxy.chooses = lambda request: DENIED if "partNumber=2" in request.path else None
    result = doctor("--state-mb", MB_IN_PARTS, remote=proxied.url)
    assert (result.code, statuses(result, "remote")["upload"]) == (1, "problem")
    assert statuses(result, "grace period")["save"] == "skipped"
    assert proxied.content() == {"uploads": []}


def test_sigterm_during_an_upload_leaves_nothing_in_the_bucket(
    proxied: Bucket, proxy: FaultProxy, tmp_path: Path
) -> None:
    proxy.bandwidth_bytes_s = 1e6
    arguments = ("--remote", proxied.url, "--local", tmp_path / "nvme", "--state-mb", MB_IN_PARTS)
    process = start_spot("doctor", *arguments)
    while not any("partNumber=" in request.path for request in proxy.seen):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 128 + 15
    assert proxied.content() == {"uploads": []}
    assert names_in(tmp_path) == set()


class Overwriting(PosixTier):
    """Says nothing, and overwrites."""

    def create(self, path: str, data: bytes) -> None:
        self.replace(path, data)


class Keeping(PosixTier):
    """Says nothing, and deletes nothing."""

    def delete(self, paths: Iterable[str]) -> None:
        pass


class Forgetting(PosixTier):
    """Takes what is uploaded, and gives back something else."""

    def upload(self, source: Path, path: str, on_bytes: Any) -> None:
        self.replace(path, b"something else")


@pytest.mark.parametrize(
    ("kind", "what"), [(Overwriting, "conditional write"), (Keeping, "delete"), (Forgetting, "upload")]
)
def test_a_store_that_does_not_do_what_it_says_is_found(kind: type[PosixTier], what: str, tmp_path: Path) -> None:
    sample = tmp_path / "sample.bin"
    sample.write_bytes(b"weights" * 1000)
    told = probed(RemoteProbe(kind(tmp_path / "run")), sample)
    assert told[what].status == "problem"
    assert ("clean up" in told) == (what == "delete")
