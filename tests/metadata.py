"""The metadata services of the clouds on loopback: their paths, headers, refusals and answers, and their faults."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import struct
import threading
import uuid
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from typing_extensions import Self


class Fault(Enum):
    """What a service does instead of its answer."""

    HANGS = "hangs"
    DRIPS = "drips"  # an answer without end, a byte at a time
    RESETS = "resets"
    IS_NO_HTTP = "is no http"
    IS_NO_JSON = "is no json"
    IS_NO_OBJECT = "is no object"
    IS_DEEP = "is deep"
    IS_EMPTY = "is empty"
    IS_HUGE = "is huge"
    HAS_WRONG_TYPES = "has wrong types"
    NOT_FOUND = "404"
    BROKEN = "500"


_BODIES = {
    Fault.IS_NO_JSON: b"<html>Sign in to the hotel's network</html>",
    Fault.IS_NO_OBJECT: b"[1, 2]",
    Fault.IS_DEEP: b"[" * 100_000,
    Fault.IS_EMPTY: b"",
    Fault.IS_HUGE: b'{"a": "' + b"x" * (4 << 20) + b'"}',
}
_STATUSES = {Fault.NOT_FOUND: 404, Fault.BROKEN: 500}


class _QuietServer(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that goes away in the middle is what the faults are for."""


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class MetadataServer:
    """A service in a thread of this process.

    documents: path -> what a GET answers, an object as JSON; every other path is answered 404. fault: what every
    answer is instead. requests: what was asked, in order.
    """

    documents: dict[str, Any] = field(default_factory=dict)
    fault: Fault | None = None
    requests: list[Request] = field(default_factory=list)

    provider: ClassVar[str]

    def __enter__(self) -> Self:
        service = self
        self.is_closing = threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_any(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                # As it was sent: `path` makes one slash of two.
                request = Request(self.command, self.requestline.split()[1], headers)
                service.requests.append(request)
                with contextlib.suppress(OSError):
                    if service.fault is not None:
                        service._fail(self, request, service.fault)
                    else:
                        self.send(*service.answer(request))

            do_GET = do_PUT = do_any  # noqa: N815

            def send(self, status: int, body: bytes) -> None:
                self.send_response_only(status)
                for name, value in service.answer_headers().items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = _QuietServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def environ(self) -> dict[str, str]:
        """The variables that lead to this service."""
        raise NotImplementedError

    @property
    def paths(self) -> list[str]:
        return [request.path for request in self.requests]

    def answer(self, request: Request) -> tuple[int, bytes]:
        """Status and body, with the refusals of the real service."""
        raise NotImplementedError

    def answer_headers(self) -> dict[str, str]:
        return {"Content-Type": "application/json"}

    def found(self, path: str) -> tuple[int, bytes]:
        if path not in self.documents:
            return 404, b""
        document = self.documents[path]
        return 200, document.encode() if isinstance(document, str) else json.dumps(document).encode()

    def _fail(self, handler: Any, request: Request, fault: Fault) -> None:
        if fault is Fault.HANGS:
            self.is_closing.wait()
        elif fault is Fault.RESETS:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.rfile.close()
            handler.connection.close()
            handler.close_connection = True
        elif fault is Fault.IS_NO_HTTP:
            handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
            handler.close_connection = True
        elif fault is Fault.DRIPS:
            handler.send_response_only(200)
            handler.end_headers()
            while not self.is_closing.wait(0.02):
                handler.wfile.write(b" ")
        elif fault is Fault.HAS_WRONG_TYPES:
            handler.send(200, json.dumps({name: [1] for document in self.objects() for name in document}).encode())
        elif fault in _STATUSES:
            handler.send(_STATUSES[fault], self.answer(request)[1])  # a body alone proves nothing
        else:
            handler.send(200, _BODIES[fault])

    def objects(self) -> list[dict[str, Any]]:
        return [document for document in self.documents.values() if isinstance(document, dict)]


class AwsServer(MetadataServer):
    """IMDSv2 of a g5.xlarge. tokens: those that are valid; forgetting them is what time does."""

    provider = "aws"
    identity = "/latest/dynamic/instance-identity/document"
    life_cycle = "/latest/meta-data/instance-life-cycle"
    rebalance = "/latest/meta-data/events/recommendations/rebalance"

    def __init__(self) -> None:
        super().__init__()
        self.tokens: set[str] = set()
        self.documents = {
            self.identity: {
                "accountId": "123456789012",
                "architecture": "x86_64",
                "availabilityZone": "us-east-1a",
                "billingProducts": None,
                "imageId": "ami-0abcdef1234567890",
                "instanceId": "i-0123456789abcdef0",
                "instanceType": "g5.xlarge",
                "pendingTime": "2026-11-20T08:00:00Z",
                "privateIp": "10.0.0.12",
                "region": "us-east-1",
                "version": "2017-09-30",
            },
            self.life_cycle: "spot",
        }

    @property
    def environ(self) -> dict[str, str]:
        return {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{self.host}/"}

    def answer(self, request: Request) -> tuple[int, bytes]:
        if "x-forwarded-for" in request.headers:
            return 403, b""
        if request.path == "/latest/api/token":
            return self._new_token(request)
        if request.headers.get("x-aws-ec2-metadata-token") not in self.tokens:
            return 401, b""
        return self.found(request.path) if request.method == "GET" else (405, b"")

    def _new_token(self, request: Request) -> tuple[int, bytes]:
        if request.method != "PUT":
            return 405, b""
        ttl = request.headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
        if not (ttl.isdecimal() and 1 <= int(ttl) <= 21_600):
            return 400, b""
        token = uuid.uuid4().hex
        self.tokens.add(token)
        return 200, token.encode()


class GcpServer(MetadataServer):
    """The metadata server of a Spot VM with an A100."""

    provider = "gcp"
    instance = "/computeMetadata/v1/instance/"

    def __init__(self) -> None:
        super().__init__()
        self.documents = {
            self.instance: {
                "attributes": {"startup-script": "#" * 200_000},
                "id": 6012345678901234567,
                "machineType": "projects/123456789012/machineTypes/a2-highgpu-1g",
                "preempted": "FALSE",
                "scheduling": {"automaticRestart": "FALSE", "onHostMaintenance": "TERMINATE", "preemptible": "TRUE"},
                "zone": "projects/123456789012/zones/us-central1-a",
            },
        }

    @property
    def environ(self) -> dict[str, str]:
        return {"GCE_METADATA_HOST": self.host}

    def answer(self, request: Request) -> tuple[int, bytes]:
        address = urlsplit(request.path)
        if request.headers.get("metadata-flavor") != "Google" or "x-forwarded-for" in request.headers:
            return 403, b""
        if parse_qs(address.query).get("recursive") != ["true"]:
            return 200, b"attributes/\nid\nmachineType\nzone\n"
        return self.found(address.path)

    def answer_headers(self) -> dict[str, str]:
        return {"Content-Type": "application/json", "Metadata-Flavor": "Google"}


class AzureServer(MetadataServer):
    """IMDS of a Spot VM with an A100."""

    provider = "azure"
    compute = "/metadata/instance/compute"
    versions = ("2021-02-01", "2021-12-13", "2023-07-01")

    def __init__(self) -> None:
        super().__init__()
        self.documents = {
            self.compute: {
                "azEnvironment": "AzurePublicCloud",
                "evictionPolicy": "Deallocate",
                "location": "westeurope",
                "priority": "Spot",
                "vmId": "02aab8a4-74ef-476e-8182-f6d2ba4166a6",
                "vmSize": "Standard_NC24ads_A100_v4",
                "zone": "2",
            },
        }

    @property
    def environ(self) -> dict[str, str]:
        return {"SPOT_AZURE_METADATA_ENDPOINT": f"http://{self.host}"}

    def answer(self, request: Request) -> tuple[int, bytes]:
        address = urlsplit(request.path)
        if request.headers.get("metadata") != "true":
            return 400, b'{"error": "Bad request. Required metadata header not specified"}'
        if "x-forwarded-for" in request.headers:
            return 400, b'{"error": "Bad request. X-Forwarded-For header is not allowed"}'
        if parse_qs(address.query).get("api-version", [""])[0] not in self.versions:
            return 400, json.dumps({"error": "Bad request", "newest-versions": self.versions}).encode()
        return self.found(address.path)
