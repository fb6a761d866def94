"""S3: measured settings, which errors pass by themselves, credentials that expire, unfinished uploads.

All through s3fs but the bytes of files, which `s3_files` moves. What `is_passing` names is tried again. Until the store
has answered once only botocore does that, three times: the address may be wrong, and whoever opens the run counts the
time. After that half a minute is ridden out.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from spot_core.errors import ConfigError
from spot_core.store import layout
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import FileRecord
from spot_core.store.s3_files import S3Files
from spot_core.store.tier import OnBytes, Place

logger = logging.getLogger(__name__)

CHECKSUM = "CRC64NVME"

# Attempts of s3fs, which waits 0.1 s, then 1.7 times longer each time.
RETRIES_AT_FIRST = 1
RETRIES = 10

_PASSING_STATUS = {408, 429, 500, 502, 503, 504}
_PASSING = {"SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "InternalError", "ServiceUnavailable"}
# A HEAD has no body: s3fs then gives its status for a code.
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "400"}
# Of single names in the answer to a deletion of many, of which one request takes so many.
_DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "InvalidObjectState"}
_KEYS_AT_ONCE = 1000
# Names that S3 gives in one answer to a listing.
PAGE_KEYS = 1000
# Stored at once, but read hours later: nothing could be read back, and nothing resumed.
_ARCHIVES = {"GLACIER", "DEEP_ARCHIVE"}
_UNKNOWN_CHECKSUM = {"InvalidArgument", "InvalidRequest", "NotImplemented"}

_T = TypeVar("_T")


def is_s3(url: str) -> bool:
    return url.partition("://")[0] in {"s3", "s3a"}


def with_defaults(storage_options: Mapping[str, Any]) -> dict[str, Any]:
    """The user's options, which win, over the measured ones. Raises ConfigError for a class that only archives."""
    is_tls = _is_tls(storage_options)
    config = {
        "connect_timeout": 5,
        "read_timeout": 60,
        "retries": {"mode": "standard", "max_attempts": 3},
        # Every byte is verified against the manifest; some servers send the whole object's checksum with a range of it.
        "response_checksum_validation": "when_required",
    }
    if not is_tls:
        config["request_checksum_calculation"] = "when_required"  # the signature covers what is sent
    # Without awscrt this one cannot be computed.
    more = {"ChecksumAlgorithm": CHECKSUM} if is_tls and importlib.util.find_spec("awscrt") is not None else {}
    more.update(storage_options.get("s3_additional_kwargs") or {})
    if more.get("StorageClass") in _ARCHIVES:
        raise ConfigError(
            f"StorageClass {more['StorageClass']} cannot be read at once, and a checkpoint is read back before it "
            "counts. Nothing was written. Use STANDARD, STANDARD_IA, INTELLIGENT_TIERING or GLACIER_IR."
        )
    return {
        "use_listings_cache": False,
        **storage_options,
        "config_kwargs": {**config, **(storage_options.get("config_kwargs") or {})},
        "s3_additional_kwargs": {name: value for name, value in more.items() if value is not None},
    }


def _is_tls(options: Mapping[str, Any]) -> bool:
    client = options.get("client_kwargs") or {}
    endpoint = options.get("endpoint_url") or client.get("endpoint_url")
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "https://"
    return bool(str(endpoint).startswith("https://") and options.get("use_ssl", True) and client.get("use_ssl", True))


def is_passing(error: BaseException) -> bool:
    """Whether `error` passes by itself: the server or the way to it is in trouble."""
    import aiohttp
    from botocore.exceptions import ConnectionError as NoConnection
    from botocore.exceptions import HTTPClientError, IncompleteReadError
    from botocore.parsers import ResponseParserError

    transport = (ConnectionError, TimeoutError, NoConnection, HTTPClientError, IncompleteReadError)
    if isinstance(error, (*transport, ResponseParserError, aiohttp.ClientError)):
        return True
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return False
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status in _PASSING_STATUS or response.get("Error", {}).get("Code") in _PASSING


def code_of(error: BaseException) -> str | None:
    """The error code of the S3 response behind `error`, None if there is none."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code"))
        cause = cause.__cause__
    return None


def reason(error: BaseException) -> str:
    """What the store said, or its code: some servers send no words."""
    said, code = str(error), code_of(error)
    if said and said != "None":
        return said
    return "the specified bucket does not exist" if code == "NoSuchBucket" else str(code or type(error).__name__)


class S3:
    """A folder of a bucket. fs: an S3FileSystem. slots: of the parts under way at a time. Threads may share it."""

    def __init__(self, fs: Any, root: str, slots: threading.Semaphore) -> None:
        from s3fs.core import set_custom_error_handler

        set_custom_error_handler(is_passing)
        self._fs = fs
        self._bucket, _, self._prefix = root.partition("/")
        self._files = S3Files(fs, self._bucket, is_passing, slots)
        self._renewing = threading.Lock()
        self._renewals = 0
        fs.retries = RETRIES_AT_FIRST

    def prepare(self) -> None:
        """Make the clients for records and for files."""
        self._files.prepare()

    def call(self, operation: Callable[[], _T]) -> _T:
        """Run `operation`; once more with new credentials if they expired, or plainly if the checksum is unknown."""
        renewals, more = self._renewals, self._fs.s3_additional_kwargs
        has_checksum = more.get("ChecksumAlgorithm") == CHECKSUM
        try:
            result = operation()
        except Exception as error:
            code = code_of(error)
            if code in _EXPIRED:
                result = self._renewed(renewals, operation)
            elif code in _UNKNOWN_CHECKSUM and has_checksum:
                logger.info("uploads go on without %s, which the store refuses (%s)", CHECKSUM, code)
                more.pop("ChecksumAlgorithm", None)
                result = operation()
            else:
                raise
        if self._fs.retries == RETRIES_AT_FIRST:
            self._fs.retries = RETRIES
        return result

    def _renewed(self, seen: int, operation: Callable[[], _T]) -> _T:
        # Uploads run in parallel and all expire together: one of them renews for all.
        with self._renewing:
            if self._renewals == seen:
                self._fs.connect(refresh=True)
                self._files.forget_credentials()
                self._renewals += 1
        try:
            return operation()
        except Exception as error:
            if code_of(error) in _EXPIRED:
                raise PermissionError(f"the credentials have expired, also when looked up again: {error}") from error
            raise

    def entries(self, folder: str, after: str, most: int | None) -> list[str]:
        """What is directly in `folder`, in pages; once there are `most` no further page is asked for.

        after: the store is asked for what comes after that name; some give all the same.
        """
        root = self._key(folder).rstrip("/")
        prefix = f"{root}/" if root else ""
        asked: dict[str, Any] = {"Bucket": self._bucket, "Prefix": prefix, "Delimiter": "/"}
        if after:
            asked["StartAfter"] = f"{prefix}{after}"
        if most is not None:
            asked["MaxKeys"] = min(most, PAGE_KEYS)
        found: list[str] = []
        while True:
            page = self._fs.call_s3("list_objects_v2", **asked)
            found += [each["Key"] for each in page.get("Contents", []) if each["Key"] != prefix]
            found += [each["Prefix"] for each in page.get("CommonPrefixes", [])]
            if not page.get("IsTruncated") or (most is not None and len(found) >= most):
                return found
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def read(self, path: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` (without it) of a file."""
        return self.call(lambda: self._files.read(self._key(path), start, end))

    def place(self, path: str, start: int, end: int, place: Place) -> int:
        """The same, each piece of them to where it belongs; returns how many."""
        return self.call(lambda: self._files.place(self._key(path), start, end, place))

    def put_file(self, source: Path, path: str, on_bytes: OnBytes) -> FileRecord | None:
        """Upload a file, a large one in parallel parts. What was begun and fails is aborted.

        Returns what was sent if the store attests that it holds it; see `S3Files.put`.
        """
        size, done = source.stat().st_size, 0

        def told(count: int) -> None:
            nonlocal done
            done += count
            on_bytes(count)

        def put() -> str | None:
            if done:
                told(-done)  # once more from the start
            try:
                return self._files.put(source, self._key(path), told)
            except FileNotFoundError as error:
                # The reply to the completing request was lost, and its repetition found the upload gone.
                if (
                    code_of(error) != "NoSuchUpload"
                    or int(self._fs.info(f"{self._bucket}/{self._key(path)}")["size"]) != size
                ):
                    raise
                return None

        digest = self.call(put)
        if done != size:
            told(size - done)
        return None if digest is None else FileRecord(path, size, digest)

    def sweep_uploads(self, before_incarnation: int) -> int:
        """Abort the unfinished uploads of this run's earlier lives; returns how many.

        An agent of an earlier life that still uploads is fenced: it could not commit what it completes.
        """
        count = 0
        for upload in self._uploads(self._key(f"{layout.CHECKPOINTS}/")):
            folder = upload["Key"].removeprefix(f"{self._prefix}/".lstrip("/")).split("/")
            name = CheckpointName.parse(folder[1]) if folder[0] == layout.CHECKPOINTS else None
            if name is not None and name.incarnation < before_incarnation:
                self._abort(upload["Key"], upload["UploadId"])
                count += 1
        return count

    def begin_upload(self, path: str) -> str:
        """Begin an upload in parts to `path`, relative to the folder, and return its id."""
        which = {"Bucket": self._bucket, "Key": self._key(path)}
        return str(self.call(lambda: self._fs.call_s3("create_multipart_upload", **which))["UploadId"])

    def unfinished_uploads(self, path: str) -> list[str]:
        """The ids of the uploads to `path` that have not ended."""
        return [upload["UploadId"] for upload in self._uploads(self._key(path))]

    def abort_upload(self, path: str, upload_id: str) -> None:
        """Forget an upload in parts; it may have ended already."""
        self._abort(self._key(path), upload_id)

    def complete_upload(self, path: str, upload_id: str) -> None:
        """End an upload in parts that has none yet, with a byte in it."""
        which = {"Bucket": self._bucket, "Key": self._key(path), "UploadId": upload_id}
        part = self.call(lambda: self._fs.call_s3("upload_part", **which, PartNumber=1, Body=b"\0"))
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        self.call(lambda: self._fs.call_s3("complete_multipart_upload", **which, MultipartUpload=parts))

    def delete(self, path: str) -> None:
        """Delete a file, or all below a folder; neither need be there. Raises OSError for what the store kept.

        s3fs's own takes the refusal of single names for success: a manifest that stays would lose its files.
        """
        root = self._key(path)
        keys = [found.partition("/")[2] for found in self._fs.find(f"{self._bucket}/{root}")]
        keys = [key for key in keys if key == root or key.startswith(f"{root}/")]
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            names = {"Objects": [{"Key": key} for key in keys[start : start + _KEYS_AT_ONCE]], "Quiet": True}
            kept = self._fs.call_s3("delete_objects", Bucket=self._bucket, Delete=names).get("Errors", [])
            if kept:
                kind = PermissionError if kept[0]["Code"] in _DENIED else OSError
                raise kind(f"{kept[0]['Code']}: {kept[0]['Key']} and {len(kept) - 1} more stay")

    def delete_file(self, path: str) -> None:
        """Delete one file by its name, which needs no listing; it may be gone already."""
        self.call(lambda: self._fs.call_s3("delete_object", Bucket=self._bucket, Key=self._key(path)))

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}".lstrip("/")

    def _abort(self, key: str, upload_id: str) -> None:
        which = {"Bucket": self._bucket, "Key": key, "UploadId": upload_id}
        try:
            self.call(lambda: self._fs.call_s3("abort_multipart_upload", **which))
        except FileNotFoundError as error:
            if code_of(error) != "NoSuchUpload":  # who began it has ended it meanwhile, or the first reply was lost
                raise

    def _uploads(self, prefix: str) -> Iterator[dict[str, Any]]:
        marks: dict[str, str] = {}
        while True:
            page = self.call(
                lambda: self._fs.call_s3("list_multipart_uploads", Bucket=self._bucket, Prefix=prefix, **marks)  # noqa: B023
            )
            # Some servers ignore the prefix, and nothing outside this run's folder may be touched.
            yield from (upload for upload in page.get("Uploads", []) if upload["Key"].startswith(prefix))
            if not page.get("IsTruncated"):
                return
            marks = {"KeyMarker": page.get("NextKeyMarker", ""), "UploadIdMarker": page.get("NextUploadIdMarker", "")}
