"""A bad network and a server in trouble: a proxy in front of an S3 server that spoils what a test chooses.

One connection to the server per request; the Host header is left alone, so that signatures stay valid.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from tests.servers import s3_options

_BLOCK_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]

    @property
    def is_data(self) -> bool:
        """Whether it is for a file of a checkpoint, as opposed to a listing or a record."""
        return "/checkpoints/" in self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to one request.

    status, code: the answer instead of the server's, which never hears of it. reset_after_bytes: so much of the
    server's reply comes through (0: none, although the request was done), then the connection is reset.
    reset_body_after_bytes: so much of the request's body is taken, then the connection is reset. delay_s: it waits
    before the server hears of it. body: with status, the whole answer. alters: the last byte of the request's body is
    another one when it arrives. etag: instead of the one in the server's reply.
    """

    status: int | None = None
    code: str = "InternalError"
    reset_after_bytes: int | None = None
    reset_body_after_bytes: int | None = None
    delay_s: float = 0.0
    body: str = ""
    alters: bool = False
    etag: str = ""


SLOW_DOWN = Fault(status=503, code="SlowDown")
LOST_REPLY = Fault(reset_after_bytes=0)
UNREACHABLE = Fault(status=0)  # hangs up without an answer
HANG = Fault(delay_s=3600.0)


class FaultProxy:
    """Passes requests to the server at `port` on this machine.

    chooses: set to a function that gives a request its fault, or None. strips: names of headers, lower case, that the
    server does not get. bandwidth_bytes_s: of each request's body. uplink_bytes_s: of all of them together. fired: the
    requests that were spoiled; seen: all.
    """

    def __init__(self, port: int) -> None:
        self.chooses: Callable[[Request], Fault | None] = lambda request: None
        self.strips: set[str] = set()
        self.bandwidth_bytes_s: float | None = None
        self.uplink_bytes_s: float | None = None
        self.fired: list[str] = []
        self.seen: list[Request] = []
        self._port = port
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    @property
    def options(self) -> dict[str, Any]:
        return s3_options(self.port)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self._loop, self._stop, self._uplink = asyncio.get_running_loop(), asyncio.Event(), asyncio.Lock()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=1 << 20)
        self.port: int = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._request(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client hung up, or the test is over
        finally:
            writer.transport.abort()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; whether the connection may serve another."""
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = lines[0].split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:-2])}
        if headers.pop("expect", None):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = int(headers.get("content-length", 0))
        request = Request(method, unquote(path), headers)
        self.seen.append(request)
        fault = self.chooses(request)
        if fault is not None and fault.reset_body_after_bytes is not None:
            self.fired.append(f"{method} {request.path}")
            await self._body(reader, min(length, fault.reset_body_after_bytes))
            return False
        body = await self._body(reader, length)
        if fault is not None:
            self.fired.append(f"{method} {request.path}")
            await asyncio.sleep(fault.delay_s)
            if fault.status is not None:
                return await self._answer(writer, fault, method)
            if fault.alters:
                body = body[:-1] + bytes([body[-1] ^ 1])
        passed = {name: value for name, value in headers.items() if name not in self.strips | {"connection"}}
        reply = await self._forward(lines[0], passed, body)
        if fault is not None and fault.etag:
            reply = re.sub(rb'(?i)(\r\netag: )"[^"]*"', rb'\1"' + fault.etag.encode() + b'"', reply, count=1)
        if fault is not None and fault.reset_after_bytes is not None:
            start = reply.index(b"\r\n\r\n") + 4 if fault.reset_after_bytes else 0
            writer.write(reply[: start + fault.reset_after_bytes])
            await writer.drain()
            await asyncio.sleep(0.05)  # an abort throws away what was not sent yet
            return False
        writer.write(reply)
        await writer.drain()
        return False

    async def _body(self, reader: asyncio.StreamReader, length: int) -> bytes:
        blocks, left = [], length
        while left:
            blocks.append(await reader.readexactly(min(left, _BLOCK_BYTES)))
            left -= len(blocks[-1])
            if bandwidth := self.bandwidth_bytes_s:
                await asyncio.sleep(len(blocks[-1]) / bandwidth)
            if uplink := self.uplink_bytes_s:
                async with self._uplink:
                    await asyncio.sleep(len(blocks[-1]) / uplink)
        return b"".join(blocks)

    async def _answer(self, writer: asyncio.StreamWriter, fault: Fault, method: str) -> bool:
        if not fault.status:
            return False
        error = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>{fault.code}</Message></Error>"
        body = (fault.body or error).encode()
        head = (
            f"HTTP/1.1 {fault.status} Spoiled\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + (b"" if method == "HEAD" else body))
        await writer.drain()
        return True

    async def _forward(self, first: str, headers: dict[str, str], body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        lines = [first, *(f"{name}: {value}" for name, value in headers.items()), "connection: close", "", ""]
        writer.write("\r\n".join(lines).encode("latin-1") + body)
        await writer.drain()
        reply = await reader.read(-1)
        writer.close()
        return reply
