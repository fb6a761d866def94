"""An address that a notice can be sent to: POST /notice announces, DELETE /notice withdraws, GET /notice tells.

The body of a POST is what the message file may hold. Nobody is asked who they are: on any address but loopback,
whoever reaches the port can make the run checkpoint and leave. It costs one relaunch, no work.
"""

from __future__ import annotations

import http.server
import json
import threading
import time

from spot_core.notice.message_file import read_message
from spot_core.notice.notice import Notice

_MOST_BYTES = 4096
_PATIENCE_S = 5.0


class Webhook:
    """Serves in threads of its own until `close`. Raises OSError if the address is taken or not of this machine."""

    source = "webhook"
    every_s = 0.5

    def __init__(self, host: str, port: int, lead_s: float) -> None:
        self._notice: Notice | None = None
        webhook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = _PATIENCE_S

            def do_POST(self) -> None:
                length = self.headers.get("Content-Length", "0")
                if not length.isdecimal() or int(length) > _MOST_BYTES:
                    return self._say(413, {"error": f"{_MOST_BYTES} bytes at most"})
                if self.path != "/notice":
                    return self._say(404, {"error": "the path is /notice"})
                now = time.time()
                try:
                    deadline, is_dated = read_message(self.rfile.read(int(length)), said_unix_s=now, lead_s=lead_s)
                except (ValueError, RecursionError) as error:
                    return self._say(400, {"error": str(error)[:500]})
                webhook._notice = Notice(webhook.source, deadline, now, is_dated)
                return self._say(202, webhook._told())

            def do_DELETE(self) -> None:
                if self.path != "/notice":
                    return self._say(404, {"error": "the path is /notice"})
                webhook._notice = None
                return self._say(200, webhook._told())

            def do_GET(self) -> None:
                self._say(200 if self.path == "/notice" else 404, webhook._told())

            def _say(self, status: int, body: dict[str, object]) -> None:
                data = json.dumps(body).encode() + b"\n"
                self.send_response_only(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Requests are not news."""

        self._server = http.server.ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="webhook", daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def look(self) -> Notice | None:
        return self._notice

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _told(self) -> dict[str, object]:
        return {"deadline_unix_s": self._notice.deadline_unix_s if self._notice else None}
