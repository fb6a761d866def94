"""Object stores to test against: real servers, with and without TLS, and one that only says no."""

from __future__ import annotations

import contextlib
import http.server
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from ipaddress import IPv4Address
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar
from urllib.parse import urlsplit

import fsspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from typing_extensions import Self

ENDPOINT = "SPOT_TEST_S3_ENDPOINT"
_IS_GIVEN = ENDPOINT in os.environ
_KEY = os.environ.get("AWS_ACCESS_KEY_ID", "test-key") if _IS_GIVEN else "test-key"
_SECRET = os.environ.get("AWS_SECRET_ACCESS_KEY", "test-secret") if _IS_GIVEN else "test-secret"
_START_TIMEOUT_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def s3_options(port: int, *, secret: str | None = None, **more: Any) -> dict[str, Any]:
    """storage_options for an S3 server on this machine; short timeouts, since it answers at once or never."""
    return {
        "key": _KEY,
        "secret": secret or _SECRET,
        "endpoint_url": f"http://127.0.0.1:{port}",
        "client_kwargs": {"region_name": "us-east-1"},
        "config_kwargs": {"connect_timeout": 2, "read_timeout": 20, "retries": {"max_attempts": 1}},
        **more,
    }


@dataclass
class S3Server:
    """A moto server in a process of its own: conditional writes, multipart uploads, no checks of signatures."""

    port: int = field(default_factory=free_port)

    _arguments: ClassVar[tuple[str, ...]] = ()
    _scheme = "http"
    _trust: ClassVar[ssl.SSLContext | None] = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port), *self._arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Its own thread-per-request server, without moto's default credentials leaking into the tests.
            env={key: value for key, value in os.environ.items() if not key.startswith("AWS_")},
        )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                self._request("GET", "moto-api/")
                return self
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self._process.kill()
                    raise
                time.sleep(0.05)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def options(self) -> dict[str, Any]:
        return s3_options(self.port)

    def new_bucket(self) -> str:
        """The name of a fresh bucket."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self._request("PUT", name)
        return name

    def _request(self, method: str, path: str) -> None:
        request = urllib.request.Request(f"{self._scheme}://127.0.0.1:{self.port}/{path}", method=method)
        with urllib.request.urlopen(request, timeout=20, context=self._trust):
            pass


class TlsS3Server(S3Server):
    """The same over TLS, with a certificate of its own in `folder`: the way uploads take in production."""

    _scheme = "https"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        certificate, key = _self_signed(folder)
        self._arguments = ("-s", "-c", str(certificate), "-k", str(key))
        self._trust = ssl.create_default_context(cafile=str(certificate))
        self._certificate = certificate

    @property
    def options(self) -> dict[str, Any]:
        options = s3_options(self.port)
        options["endpoint_url"] = f"https://127.0.0.1:{self.port}"
        options["client_kwargs"]["verify"] = str(self._certificate)
        return options


class GivenS3Server:
    """A real server that is running already: SPOT_TEST_S3_ENDPOINT, with credentials where s3fs looks for them.

    port: of a server on this machine without TLS, which a proxy can stand in front of; None of any other.
    """

    def __init__(self, endpoint: str) -> None:
        self.options: dict[str, Any] = {"endpoint_url": endpoint, "client_kwargs": {"region_name": "us-east-1"}}
        address = urlsplit(endpoint)
        is_near = address.scheme == "http" and address.hostname in {"127.0.0.1", "localhost"}
        self.port = address.port if is_near else None

    def new_bucket(self) -> str:
        name = f"spot-test-{uuid.uuid4().hex[:12]}"
        # mkdir would name the region, which some servers and us-east-1 refuse
        fsspec.filesystem("s3", **self.options).call_s3("create_bucket", Bucket=name)
        return name


@contextlib.contextmanager
def server_at(endpoint: str | None) -> Iterator[GivenS3Server | S3Server]:
    """The server at that address; moto without TLS if there is none."""
    if endpoint is not None:
        yield GivenS3Server(endpoint)
        return
    with S3Server() as server:
        yield server


def _self_signed(folder: Path) -> tuple[Path, Path]:
    """Certificate and key files for 127.0.0.1, good for a day."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "server.pem", folder / "server.key"
    paths[0].write_bytes(certificate.public_bytes(Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return paths


class OverwritingS3Server:
    """rclone's server over a folder: fast, and without conditional writes: every racing create wins."""

    def __init__(self, folder: Path) -> None:
        self.port, self._folder = free_port(), folder
        self.options = s3_options(self.port)

    def __enter__(self) -> Self:
        command = str(Path(sys.executable).with_name("rclone"))
        address = f"127.0.0.1:{self.port}"
        self._process = subprocess.Popen(
            [command, "serve", "s3", "--addr", address, "--auth-key", f"{_KEY},{_SECRET}", str(self._folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "RCLONE_CONFIG": str(self._folder / "none.conf")},
        )
        wait_until_it_listens(self._process, self.port)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def new_bucket(self) -> str:
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        fsspec.filesystem("s3", **self.options).mkdir(name)
        return name


def wait_until_it_listens(process: subprocess.Popen[bytes], port: int) -> None:
    """Raises OSError, and ends the process, if it takes too long or has ended."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise
            time.sleep(0.05)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # the client waits for "100 Continue"

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class _Endpoint:
    """An HTTP server in a thread of this process."""

    def __init__(self, handler: type[_Handler]) -> None:
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def options(self) -> dict[str, Any]:
        return s3_options(self._server.server_address[1])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class RefusingServer(_Endpoint):
    """An S3 endpoint that answers every request with one error, as a store does without permission or in trouble."""

    def __init__(self, status: int, code: str) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]

        class Handler(_Handler):
            def do_any(self) -> None:
                self._body()
                self._answer(status, headers, body)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = do_any  # noqa: N815

        super().__init__(Handler)


def nothing_listens(*, start_timeout_s: float) -> dict[str, Any]:
    """Options of a SpotCallback whose remote cannot be reached."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    return {
        "remote": "s3://bucket/run",
        "start_timeout_s": start_timeout_s,
        "storage_options": {"endpoint_url": f"http://127.0.0.1:{port}", "key": "testing", "secret": "testing"},
    }
