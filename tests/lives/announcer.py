"""Everything that can tell a job of its preemption: metadata services over HTTP, a file, a webhook."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spot_core.chaos.metadata_servers import AwsServer, AzureServer, GcpServer
from tests.servers import free_port

SOURCES = ("aws", "gcp", "azure", "file", "webhook")
# Google's service names no time: a job is told of this one.
LEAD_S = 10.0


@dataclasses.dataclass(frozen=True)
class Announcer:
    """options, environ: lead a job here. announce: takes seconds from now, returns the Unix time of the end."""

    options: dict[str, Any]
    environ: dict[str, str]
    announce: Callable[[float], float]
    withdraw: Callable[[], Any]

    def over(self, spec: Any) -> Any:
        """The job, told from here."""
        return dataclasses.replace(spec, options={**spec.options, **self.options}, environ=self.environ)


@contextlib.contextmanager
def announcer(source: str, folder: Path) -> Iterator[Announcer]:
    """One of SOURCES. folder: for what it may have to write."""
    if source == "file":
        yield _file(folder)
    elif source == "webhook":
        yield _webhook()
    else:
        with {"aws": AwsServer, "gcp": GcpServer, "azure": AzureServer}[source]() as server:
            options = {"notice_lead_s": LEAD_S} if source == "gcp" else {}
            yield Announcer(options, server.environ, server.announce, server.withdraw)


def _file(folder: Path) -> Announcer:
    path = folder / "preempted"
    folder.mkdir(parents=True, exist_ok=True)

    def write(lead_s: float) -> float:
        path.write_text(json.dumps({"in_s": lead_s}))
        return path.stat().st_mtime + lead_s

    return Announcer({"notice_file": str(path)}, {}, write, path.unlink)


def _webhook() -> Announcer:
    address = f"127.0.0.1:{free_port()}"

    def send(method: str, body: Any) -> Any:
        request = urllib.request.Request(f"http://{address}/notice", json.dumps(body).encode(), method=method)
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)

    def announce(lead_s: float) -> float:
        return float(send("POST", {"in_s": lead_s})["deadline_unix_s"])

    return Announcer({"notice_webhook": address}, {}, announce, lambda: send("DELETE", {}))
