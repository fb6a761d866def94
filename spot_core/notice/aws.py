"""EC2's interruption notice: two minutes before a spot instance is stopped or terminated, with the time."""

from __future__ import annotations

import http.client
import json
import time
from datetime import datetime, timezone

from spot_core.notice.metadata import AwsMetadata, body_of
from spot_core.notice.notice import Notice

_PATH = "/latest/meta-data/spot/instance-action"
_PATIENCE_S = 2.0


class AwsNotice:
    """Asks instance-action, which does not exist until there is a notice."""

    source = "aws"
    every_s = 5.0

    def __init__(self, service: AwsMetadata) -> None:
        self._service = service
        self._seen: Notice | None = None

    def look(self) -> Notice | None:
        answer = self._service.get(_PATH, time.monotonic() + _PATIENCE_S)
        if answer.status == http.client.NOT_FOUND:
            self._seen = None
            return None
        deadline_unix_s = utc_unix_s(str(json.loads(body_of(answer))["time"]))
        if self._seen is None or self._seen.deadline_unix_s != deadline_unix_s:
            self._seen = Notice(self.source, deadline_unix_s, time.time())
        return self._seen


def utc_unix_s(text: str) -> float:
    """Unix seconds of `2026-11-21T08:22:00Z`. Raises ValueError."""
    # Python 3.10 does not read the Z.
    return datetime.fromisoformat(text.removesuffix("Z")).replace(tzinfo=timezone.utc).timestamp()
