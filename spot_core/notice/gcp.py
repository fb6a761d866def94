"""Compute Engine's notice: `preempted` turns TRUE, without a time. The shutdown signal follows, half a minute before
the end; it follows later where the VM's preemptionNoticeDuration says so."""

from __future__ import annotations

import time

from spot_core.notice.metadata import ask, body_of
from spot_core.notice.notice import Notice

# Of a Spot VM without a notice duration of its own.
LEAD_S = 30.0
_HEADERS = {"Metadata-Flavor": "Google"}
_PATIENCE_S = 2.0
# The service answers at once when the value changes, and says how it is after so many seconds if it does not.
_POLL_S = 60.0


class GcpNotice:
    """Waits at the service for the value to change. lead_s: from the notice to the end."""

    source = "gcp"
    every_s = 1.0  # between two waits; also where nothing waits

    def __init__(self, endpoint: str, lead_s: float = LEAD_S) -> None:
        self._url = f"{endpoint}/computeMetadata/v1/instance/preempted"
        self._lead_s = lead_s
        self._etag: str | None = None
        self._seen: Notice | None = None

    def look(self) -> Notice | None:
        wait = f"?wait_for_change=true&timeout_sec={_POLL_S:.0f}&last_etag={self._etag}" if self._etag else ""
        until_s = time.monotonic() + _PATIENCE_S + (_POLL_S if wait else 0.0)
        try:
            answer = ask(self._url + wait, headers=_HEADERS, until_s=until_s)
            text = body_of(answer).strip().upper()
        except OSError:
            self._etag = None
            raise
        self._etag = answer.etag
        if text == b"FALSE":
            self._seen = None
        elif text != b"TRUE":
            raise ValueError(f"{self._url} says {text[:100]!r}")
        elif self._seen is None:
            now = time.time()
            self._seen = Notice(self.source, now + self._lead_s, now, is_dated=False)
        return self._seen
