"""The metadata services of the product with faults: what a service can do instead of its answer."""

from __future__ import annotations

import json
import socket
import struct
from enum import Enum
from typing import Any

from spot_core.chaos import metadata_servers
from spot_core.chaos.metadata_service import Handler, Reply, Request
from spot_core.chaos.metadata_service import MetadataServer as FaultlessServer


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


class MetadataServer(FaultlessServer):
    """A service that may fail. fault: what every answer is instead. requests: what was asked, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.fault: Fault | None = None
        self.requests: list[Request] = []

    @property
    def paths(self) -> list[str]:
        return [request.path for request in self.requests]

    def objects(self) -> list[dict[str, Any]]:
        return [document for document in self.documents.values() if isinstance(document, dict)]

    def respond(self, handler: Handler, request: Request) -> None:
        self.requests.append(request)
        if self.fault is None:
            super().respond(handler, request)
        else:
            self._fail(handler, request, self.fault)

    def _fail(self, handler: Handler, request: Request, fault: Fault) -> None:
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
            wrong = {name: [1] for document in self.objects() for name in document}
            handler.send(Reply(200, json.dumps(wrong).encode()))
        elif fault in _STATUSES:
            handler.send(Reply(_STATUSES[fault], self.answer(request).body))  # a body alone proves nothing
        else:
            handler.send(Reply(200, _BODIES[fault]))


class AwsServer(MetadataServer, metadata_servers.AwsServer):
    pass


class GcpServer(MetadataServer, metadata_servers.GcpServer):
    pass


class AzureServer(MetadataServer, metadata_servers.AzureServer):
    pass
