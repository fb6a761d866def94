"""A metadata service on this machine's loopback, with a preemption to announce: what the providers have in common.

Each connection is served by a thread; `documents` change under one lock, and whoever waits for a change is woken.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, ClassVar, TypeVar

from spot_core.errors import ConfigError

_LOOPBACK = "127.0.0.1"
_LONGEST_BODY = 1 << 16

Tell = Callable[[str], None]

_Server = TypeVar("_Server", bound="MetadataServer")


def nobody(line: str) -> None:
    """Is told and says nothing."""


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked. path: as it was sent, with its query. headers: names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Reply:
    """What is answered. refusal: why whoever asks must ask differently, in words; empty for all that is in order."""

    status: int
    body: bytes = b""
    refusal: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


class MetadataServer:
    """The service of one instance, from `with` to its end; only this machine reaches it.

    documents: path -> what a GET answers, text or an object as JSON. changed: their lock, and woken by each change.
    port: 0 takes a free one. tell: is given one line for each announcement and each refusal, by whichever thread.
    Raises ConfigError if the port cannot be had.
    """

    provider: ClassVar[str]
    usual_lead_s: ClassVar[float]

    def __init__(self, *, port: int = 0, tell: Tell = nobody) -> None:
        self.documents: dict[str, Any] = self._first_documents()
        self.is_closing = threading.Event()
        self.tell = tell
        self._port = port
        self.changed = threading.Condition()

    def __enter__(self: _Server) -> _Server:
        try:
            self._http = _HttpServer((_LOOPBACK, self._port), Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"port {self._port} of {_LOOPBACK} cannot be served: {error}") from error
        self._http.service = self
        threading.Thread(target=self._http.serve_forever, args=(0.05,), name="metadata", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closing.set()
        with self.changed:
            self.changed.notify_all()
        self._http.shutdown()
        self._http.server_close()

    @property
    def host(self) -> str:
        return f"{_LOOPBACK}:{self._http.server_address[1]}"

    @property
    def environ(self) -> dict[str, str]:
        """The variables that lead to this service."""
        raise NotImplementedError

    def announce(self, lead_s: float) -> float:
        """Announce a preemption no sooner than lead_s from now; returns the announced deadline in Unix seconds."""
        with self.changed:
            deadline = self._announce(time.time() + lead_s)
            self.changed.notify_all()
        self.tell(f"{self.provider}: preemption announced, in {deadline - time.time():.0f} s at {iso(deadline)}")
        return deadline

    def withdraw(self) -> None:
        """Take the announcement back."""
        with self.changed:
            self._withdraw()
            self.changed.notify_all()
        self.tell(f"{self.provider}: preemption withdrawn")

    def new_instance(self) -> None:
        """From now on another instance asks: it has an id of its own, and nothing is announced to it."""
        with self.changed:
            self._withdraw()
            self._rename()
            self.changed.notify_all()

    def respond(self, handler: Handler, request: Request) -> None:
        """Answer one request on its connection."""
        reply = self.answer(request)
        if reply.refusal:
            # repr: what a client sends must not reach the terminal as control characters.
            self.tell(f"{self.provider}: {reply.status} to {request.method} {request.path!r:.200}: {reply.refusal}")
        handler.send(reply)

    def answer(self, request: Request) -> Reply:
        """The reply, with the refusals of the real service."""
        raise NotImplementedError

    def found(self, path: str, *, may_come: tuple[str, ...] = ()) -> Reply:
        """The document at `path`. may_come: paths that are empty until something is announced."""
        with self.changed:
            document = self.documents.get(path)
            if document is None:
                return Reply(404, refusal="" if path in may_come else "this rehearsal does not serve this path")
            if isinstance(document, str):
                return Reply(200, document.encode(), headers={"Content-Type": "text/plain"})
            return Reply(200, json.dumps(document).encode(), headers={"Content-Type": "application/json"})

    def _first_documents(self) -> dict[str, Any]:
        raise NotImplementedError

    def _announce(self, deadline: float) -> float:
        raise NotImplementedError

    def _withdraw(self) -> None:
        raise NotImplementedError

    def _rename(self) -> None:
        raise NotImplementedError


def iso(unix_s: float) -> str:
    """Whole seconds in UTC: `2026-11-21T08:22:00Z`."""
    return datetime.fromtimestamp(int(unix_s), timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class _HttpServer(http.server.ThreadingHTTPServer):
    service: MetadataServer

    def handle_error(self, *_: object) -> None:
        """A client that goes away in the middle is no trouble of the service's."""


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: _HttpServer

    def _serve(self) -> None:
        length = self.headers.get("Content-Length", "0")
        if not (length.isdecimal() and int(length) <= _LONGEST_BODY):
            self.close_connection = True
            self.send(Reply(413))
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        # As it was sent: `self.path` makes one slash of two.
        request = Request(self.command, self.requestline.split()[1], headers, self.rfile.read(int(length)))
        with contextlib.suppress(OSError):
            self.server.service.respond(self, request)

    do_GET = do_POST = do_PUT = _serve  # noqa: N815

    def send(self, reply: Reply) -> None:
        self.send_response_only(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, *_: object) -> None:
        pass
