"""Object stores to test against: a real server over HTTP, one that loses replies, and one that only says no."""

from __future__ import annotations

import http.client
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from typing_extensions import Self

_START_TIMEOUT_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def s3_options(port: int, *, secret: str = "test-secret", **more: Any) -> dict[str, Any]:
    """storage_options for an S3 server on this machine; short timeouts, since it answers at once or never."""
    return {
        "key": "test-key",
        "secret": secret,
        "endpoint_url": f"http://127.0.0.1:{port}",
        "client_kwargs": {"region_name": "us-east-1"},
        "config_kwargs": {"connect_timeout": 2, "read_timeout": 20, "retries": {"max_attempts": 1}},
        **more,
    }


@dataclass
class S3Server:
    """A moto server in a process of its own: conditional writes, multipart uploads, no checks of signatures."""

    port: int = field(default_factory=free_port)

    def __enter__(self) -> S3Server:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
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
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", method=method)
        with urllib.request.urlopen(request, timeout=20):
            pass


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


class LossyProxy(_Endpoint):
    """In front of a server: passes every request on, and hangs up instead of passing on the reply to some.

    loses: set to a function of method and path that chooses them. lost: what it hung up on.
    """

    def __init__(self, port: int) -> None:
        self.loses: Callable[[str, str], bool] = lambda method, path: False
        self.lost: list[str] = []
        proxy = self

        class Handler(_Handler):
            def do_any(self) -> None:
                upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
                headers = {key: value for key, value in self.headers.items() if key.lower() != "expect"}
                upstream.request(self.command, self.path, self._body(), headers)
                reply = upstream.getresponse()
                body = reply.read()
                upstream.close()
                if proxy.loses(self.command, self.path):
                    proxy.lost.append(f"{self.command} {self.path}")
                    self.close_connection = True
                    return
                kept = [header for header in reply.getheaders() if header[0].lower() != "connection"]
                self._answer(reply.status, kept, body)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = do_any  # noqa: N815

        super().__init__(Handler)
