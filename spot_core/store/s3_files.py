"""Files to and from S3, in parts and in threads, with botocore's own client.

s3fs moves every byte in one thread, its event loop: there signing, TLS and copying wait for each other. Here each part
has a thread, in which all of that lets go of the interpreter. Options, retries and errors are those of the
S3FileSystem, which begins and ends uploads and does everything else.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from io import FileIO
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import stamina
from blake3 import blake3

from spot_core.bounded import in_order
from spot_core.store.tier import BLOCK_BYTES, OnBytes, Place

PART_BYTES = 8 << 20
PARALLEL_PARTS = 8
_MAX_PARTS = 10_000
_SIGNER = "s3v4-by-botocore"
_SIGNED = bytearray(b"what was signed")

_T = TypeVar("_T")


class S3Files:
    """Files in one bucket. fs: an S3FileSystem. is_passing: which errors are worth another attempt. slots: of the parts
    that may be under way.

    Threads may share it. Raises what s3fs raises (FileNotFoundError, PermissionError, OSError), caused by botocore's.
    """

    def __init__(
        self, fs: Any, bucket: str, is_passing: Callable[[Exception], bool], slots: threading.Semaphore
    ) -> None:
        self._fs, self._bucket, self._is_passing, self._slots = fs, bucket, is_passing, slots
        self._making, self._trying = threading.Lock(), threading.Lock()
        self._made: Any = None
        self._refuses: bool | None = None

    def prepare(self) -> None:
        """Make the client, and that of the file system."""
        self._client()

    def forget_credentials(self) -> None:
        """Look them up again at the next request."""
        self._made = None

    def read(self, key: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` (without it) of an object, fewer where it is shorter."""
        return self._get(key, start, end, lambda body: bytes(body.read()))

    def place(self, key: str, start: int, end: int, place: Place) -> int:
        """As `read`, block by block to where each belongs; returns how many bytes. After a failure from the start."""

        def use(body: Any) -> int:
            at = start
            for block in body.iter_chunks(BLOCK_BYTES):
                place(at, block)
                at += len(block)
            return at - start

        return self._get(key, start, end, use)

    def _get(self, key: str, start: int, end: int, use: Callable[[Any], _T]) -> _T:
        which = f"bytes={start}-{end - 1}"
        return self._request("get_object", lambda reply: use(reply["Body"]), Key=key, Range=which)

    def put(self, source: Path, key: str, on_bytes: OnBytes) -> str | None:
        """Upload a file; on_bytes is told of each part. What was begun and fails is aborted by its own id.

        Returns the digest of what was sent if the store says that it holds just that: by its size and, as most stores
        give it, an MD5 in the ETag. Nobody told it that sum: it must have read the bytes. None if the ETag is something
        else, as with keys of KMS: then only reading back tells. Parts are not summed up here for a store that refuses
        what does not fit its signature: it has read them to accept them, and the ETag has to be that of their ETags.
        """
        size = source.stat().st_size
        part_bytes = max(PART_BYTES, -(-size // _MAX_PARTS))
        if size <= part_bytes:
            digest = blake3()
            with open(source, "rb", buffering=0) as file:
                body = _read_part(file, digest, bytearray(size))
            etag = _md5(body).hex()
            self._request("put_object", lambda _: None, Key=key, Body=body)
            on_bytes(len(body))
        else:
            which = {"Bucket": self._bucket, "Key": key}
            which["UploadId"] = self._fs.call_s3("create_multipart_upload", **which)["UploadId"]
            try:
                digest, etag, parts = self._put_parts(source, size, part_bytes, which, on_bytes)
                self._fs.call_s3("complete_multipart_upload", **which, MultipartUpload={"Parts": parts})
            except Exception:
                with contextlib.suppress(Exception):
                    self._fs.call_s3("abort_multipart_upload", **which)
                raise
        found = self._request(
            "head_object", lambda reply: (reply["ContentLength"], reply.get("ETag", "").strip('"')), Key=key
        )
        return str(digest.hexdigest()) if found == (size, etag) else None

    def _put_parts(
        self, source: Path, size: int, part_bytes: int, which: dict[str, str], on_bytes: OnBytes
    ) -> tuple[blake3, str, list[dict[str, Any]]]:
        """Returns the digest of what was sent, the ETag that the whole will have, and how the store names its parts."""
        digest, sums = blake3(), b""
        is_summed_there = self._refuses_altered(which["Key"])
        is_over = threading.Event()
        free: list[bytearray] = []  # new memory costs the system more than sending what is in it

        def put(number: int, body: bytearray) -> tuple[dict[str, Any], bytes, int]:
            what = {**which, "PartNumber": number, "Body": body}
            etag = self._request("upload_part", itemgetter("ETag"), is_wanted=lambda: not is_over.is_set(), **what)
            md5, count = _reported(etag) if is_summed_there else _md5(body), len(body)
            free.append(body)  # not given to who waits for the parts in order: while the first is slow all others come
            return {"PartNumber": number, "ETag": etag}, md5, count

        def puts(file: FileIO) -> Iterator[Callable[[], tuple[dict[str, Any], bytes, int]]]:
            for number in range(1, -(-size // part_bytes) + 1):
                yield partial(put, number, _read_part(file, digest, free.pop() if free else bytearray(part_bytes)))

        parts = []
        try:
            with (
                open(source, "rb", buffering=0) as file,
                contextlib.closing(in_order(puts(file), self._slots, are_results_large=False)) as sent,
            ):
                for part, md5, count in sent:
                    parts.append(part)
                    sums += md5
                    on_bytes(count)
        finally:
            # What is on its way after a failure is not waited for: before an announced end something else may have to
            # be uploaded.
            is_over.set()
        return digest, f"{_md5(sums).hex()}-{len(parts)}", parts

    def _refuses_altered(self, key: str) -> bool:
        """Whether the store was seen to refuse a part of an upload to `key` that is not what was signed.

        Over TLS the bytes are not signed. The upload is aborted: whatever the store takes, nothing comes of it.
        """
        with self._trying:
            if self._refuses is None:
                self._refuses = self._client().meta.endpoint_url.startswith("http://") and self._try_altered(key)
            return self._refuses

    def _try_altered(self, key: str) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        altering = _make_client(self._fs)
        altering.meta.events.register("before-send.s3.UploadPart", _alter)
        which = {"Bucket": self._bucket, "Key": key}
        which["UploadId"] = self._fs.call_s3("create_multipart_upload", **which)["UploadId"]
        try:
            altering.upload_part(**which, **_additions(self._fs, altering, "upload_part"), PartNumber=1, Body=_SIGNED)
        except ClientError as error:
            return str(error.response.get("Error", {}).get("Code")) == "XAmzContentSHA256Mismatch"
        except BotoCoreError:
            pass  # the network: sums are taken here, which is as good
        finally:
            altering.close()
            with contextlib.suppress(Exception):
                self._fs.call_s3("abort_multipart_upload", **which)
        return False

    def _request(
        self,
        operation: str,
        use: Callable[[Any], _T],
        *,
        is_wanted: Callable[[], bool] = lambda: True,
        **parameters: Any,
    ) -> _T:
        """One request, with what the user's options add to it, repeated while its errors pass and it is wanted."""
        from botocore.exceptions import ClientError
        from s3fs.errors import translate_boto_error

        attempts = stamina.retry_context(
            lambda error: is_wanted() and self._is_passing(error),
            attempts=self._fs.retries,
            timeout=None,
            wait_initial=0.1,
            wait_exp_base=1.7,
            wait_max=15.0,
            wait_jitter=0.0,
        )
        try:
            for attempt in attempts:
                with attempt:
                    client = self._client()
                    more = _additions(self._fs, client, operation)
                    return use(getattr(client, operation)(**{"Bucket": self._bucket, **more, **parameters}))
        except ClientError as error:
            raise translate_boto_error(error) from error
        raise AssertionError("stamina re-raises the last error")

    def _client(self) -> Any:
        with self._making:
            if self._made is None:
                self._made = _make_client(self._fs)
            return self._made


def _read_part(file: FileIO, digest: blake3, body: bytearray) -> bytearray:
    """Fill `body` with what comes next in a file, or less at its end, digested block by block; returns it.

    A bytearray is what botocore sends as it is. Of bytes it makes a file, which is sent by 16 KiB.
    """
    filled = 0
    with memoryview(body) as view:
        while filled < len(view) and (count := file.readinto(view[filled : filled + BLOCK_BYTES])):
            digest.update(view[filled : filled + count])
            filled += count
    del body[filled:]
    return body


def _md5(data: bytes | bytearray) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


def _reported(etag: str) -> bytes:
    """The sum that the store has made of a part; what is none fits no ETag of the whole."""
    with contextlib.suppress(ValueError):
        return bytes.fromhex(etag.strip('"'))
    return b""


def _alter(request: Any, **_: Any) -> None:
    """Send something else than what was signed."""
    request.body = bytearray(reversed(_SIGNED))


def _make_client(fs: Any) -> Any:
    """A client with the options of an S3FileSystem, as `S3FileSystem.set_session` passes them on."""
    import botocore.session
    from botocore import UNSIGNED
    from botocore.auth import AUTH_TYPE_MAPS, S3SigV4Auth
    from botocore.config import Config

    fs.connect()
    session = botocore.session.Session(**fs.kwargs)
    # What it has read of S3's interface: a fifth of a second of parsing.
    session.register_component("data_loader", fs.session.get_component("data_loader"))
    config = {name: value for name, value in fs.config_kwargs.items() if name in Config.OPTION_DEFAULTS}
    keys = {"aws_access_key_id": fs.key, "aws_secret_access_key": fs.secret, "aws_session_token": fs.token}
    options = {**keys, "endpoint_url": fs.endpoint_url, "use_ssl": fs.use_ssl, **fs.client_kwargs}
    if fs.anon:
        config["signature_version"] = UNSIGNED
        options = {name: value for name, value in options.items() if name not in keys}
    client = session.create_client("s3", config=Config(**config), **options)
    if "signature_version" not in config and not client.meta.config.auth_scheme_preference:
        AUTH_TYPE_MAPS[_SIGNER] = S3SigV4Auth
        client.meta.events.register("choose-signer.s3", _choose_signer)
    return client


def _choose_signer(signing_name: str, signature_version: object, **_: object) -> str | None:
    """Not the CRT's signer, which has Python hand it a body by 4 KiB, but botocore's own. None: as it would be."""
    return _SIGNER if signing_name == "s3" and signature_version in {"v4", "s3v4"} else None


def _additions(fs: Any, client: Any, operation: str) -> dict[str, Any]:
    """What the user's options say for every request, as far as this one takes it."""
    name = client.meta.method_to_api_mapping[operation]
    taken = client.meta.service_model.operation_model(name).input_shape.members
    return {key: value for key, value in {**fs.s3_additional_kwargs, **fs.req_kw}.items() if key in taken}
