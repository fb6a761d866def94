"""Azure's Scheduled Events: a Preempt event that names this VM, half a minute or more before it is evicted."""

from __future__ import annotations

import json
import time
from email.utils import parsedate_to_datetime
from typing import Any

from spot_core.notice.metadata import ask, body_of
from spot_core.notice.notice import Notice

_VERSION = "2020-07-01"
_HEADERS = {"Metadata": "true"}
# The first request of a VM turns the service on, which may take it up to two minutes.
_PATIENCE_S = 5.0
# An event that has started has no date any more: the VM goes now.
_NOW_S = 5.0


class AzureNotice:
    """Asks for events. name: of this VM: those of the others in its scale set are listed too."""

    source = "azure"
    every_s = 1.0

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._name: str | None = None
        self._seen: tuple[str, Notice] | None = None

    def look(self) -> Notice | None:
        body = self._ask(f"/metadata/scheduledevents?api-version={_VERSION}")
        events = [event for event in body["Events"] if event["EventType"] == "Preempt" and self._is_mine(event)]
        if not events:
            self._seen = None
            return None
        key, notice = min((self._read(event) for event in events), key=lambda each: each[1].deadline_unix_s)
        if self._seen is None or self._seen[0] != key:
            self._seen = (key, notice)
        return self._seen[1]

    def _read(self, event: dict[str, Any]) -> tuple[str, Notice]:
        now, when = time.time(), str(event["NotBefore"])
        deadline_unix_s = parsedate_to_datetime(when).timestamp() if when else now + _NOW_S
        return f"{event['EventId']} {when}", Notice(self.source, deadline_unix_s, now, is_dated=bool(when))

    def _is_mine(self, event: dict[str, Any]) -> bool:
        if self._name is None:
            self._name = str(self._ask("/metadata/instance/compute?api-version=2021-02-01")["name"])
        # In a scale set without orchestration resources are named `set_3`, as the VM itself is.
        return self._name.lower() in {str(name).lower() for name in event["Resources"]}

    def _ask(self, path: str) -> dict[str, Any]:
        answer = ask(self._endpoint + path, headers=_HEADERS, until_s=time.monotonic() + _PATIENCE_S)
        body = json.loads(body_of(answer))
        if not isinstance(body, dict):
            raise ValueError(f"{path} answers with no object")
        return body
