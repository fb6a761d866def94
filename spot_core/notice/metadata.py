"""Metadata services of the clouds: HTTP on a link-local address, bounded in time and in bytes.

Proxies and redirects are never followed: the answer of anybody else would be about another machine. http.client knows
neither, and needs no package.
"""

from __future__ import annotations

import http.client
import math
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

LINK_LOCAL = "http://169.254.169.254"
# All that is known of a GCP instance includes its owner's startup scripts: 512 KiB are allowed for those.
_BODY_BYTES = 1 << 20
_TOKEN_TTL_S = 21_600
# They go into the next request.
_ETAG = re.compile(r"[A-Za-z0-9._-]{1,200}")
_TOKEN = re.compile(r"[!-~]{1,1000}")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a service said; a status other than 200 is an answer too. etag: of this state of what was asked for."""

    status: int
    body: bytes
    etag: str | None = None


def ask(url: str, *, headers: Mapping[str, str], until_s: float, method: str = "GET") -> Answer:
    """One request, whose answer is complete by `until_s` of the monotonic clock.

    Raises OSError for everything that is no answer: a timeout, a reset, a body without end, what is not HTTP. Only
    the resolution of a name is not bounded: services are addressed by number unless a variable says otherwise.
    """
    try:
        address = urlsplit(url)
        if address.scheme != "http" or not address.hostname:
            raise OSError(f"{url!r} is not an http:// address")
        connection = _Connection(address.hostname, address.port or 80, until_s)
        try:
            connection.request(method, f"{address.path}?{address.query}".rstrip("?"), headers=dict(headers))
            response = connection.getresponse()
            body, etag = response.read(_BODY_BYTES + 1), response.getheader("ETag")
        finally:
            connection.close()
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"{url}: {error!r:.300}") from error
    if len(body) > _BODY_BYTES:
        raise OSError(f"{url} answers with more than {_BODY_BYTES} bytes")
    return Answer(response.status, body, etag if etag is not None and _ETAG.fullmatch(etag) else None)


def body_of(answer: Answer) -> bytes:
    """The body of a success. Raises OSError for any other status."""
    if answer.status != http.client.OK:
        raise OSError(f"answered with status {answer.status}")
    return answer.body


class AwsMetadata:
    """IMDSv2. Keeps the session token, and gets another when the service no longer takes it."""

    def __init__(self, endpoint: str = LINK_LOCAL) -> None:
        self.endpoint = endpoint.rstrip("/")
        self._token: str | None = None

    def get(self, path: str, until_s: float) -> Answer:
        """Raises OSError if there is no answer, or no token."""
        answer = self._get(path, until_s)
        if answer.status == http.client.UNAUTHORIZED:
            self._token = None
            answer = self._get(path, until_s)
        return answer

    def token_status(self, until_s: float) -> int:
        """The status with which the service answers when it is asked for a token. Raises OSError for no answer."""
        return self._ask_token(until_s).status

    def _get(self, path: str, until_s: float) -> Answer:
        if self._token is None:
            text = body_of(self._ask_token(until_s)).decode(errors="replace")
            if not _TOKEN.fullmatch(text):
                raise OSError(f"{self.endpoint} gives a token that is none: {text[:50]!r}")
            self._token = text
        headers = {"X-aws-ec2-metadata-token": self._token}
        return ask(f"{self.endpoint}{path}", headers=headers, until_s=until_s)

    def _ask_token(self, until_s: float) -> Answer:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_TTL_S)}
        return ask(f"{self.endpoint}/latest/api/token", headers=headers, until_s=until_s, method="PUT")


def aws_metadata(environ: Mapping[str, str]) -> AwsMetadata:
    """The service as the AWS SDKs find it. Raises OSError if the user has turned it off."""
    if environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        raise OSError("AWS_EC2_METADATA_DISABLED is set")
    return AwsMetadata(environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or LINK_LOCAL)


def gcp_endpoint(environ: Mapping[str, str]) -> str:
    """Where Google's own libraries look for the metadata server."""
    host = environ.get("GCE_METADATA_HOST")
    return f"http://{host}" if host else LINK_LOCAL


def azure_endpoint(environ: Mapping[str, str]) -> str:
    """Azure has no variable for it: the project's own serves rehearsals."""
    return (environ.get("SPOT_AZURE_METADATA_ENDPOINT") or LINK_LOCAL).rstrip("/")


class _Connection(http.client.HTTPConnection):
    def __init__(self, host: str, port: int, until_s: float) -> None:
        super().__init__(host, port)
        self._until_s = until_s

    def connect(self) -> None:
        self.timeout = _left_s(self._until_s)
        super().connect()
        self.sock = _HurriedSocket(fileno=self.sock.detach())
        self.sock.until_s = self._until_s
        self.sock.settimeout(_left_s(self._until_s))


class _HurriedSocket(socket.socket):
    """All reads together end by `until_s`: a plain timeout starts again with each byte that a bad server sends."""

    until_s = math.inf

    def recv_into(self, buffer: bytearray, nbytes: int = 0, flags: int = 0) -> int:  # type: ignore[override]
        self.settimeout(_left_s(self.until_s))
        return super().recv_into(buffer, nbytes, flags)


def _left_s(until_s: float) -> float:
    left_s = until_s - time.monotonic()
    if left_s <= 0.0:
        raise TimeoutError("no answer in time")
    return left_s
