"""A file that announces a preemption by being there: for clouds without a metadata service, and for any script.

Empty, the end is `lead_s` after the file was last touched. Or it holds JSON: `{"in_s": 60}` counts from that moment
too, `{"at": "2026-11-21T08:22:00Z"}` is a time. Removing the file withdraws the notice.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from spot_core.notice.aws import utc_unix_s
from spot_core.notice.notice import Notice

_MOST_BYTES = 4096


class MessageFile:
    """Looks for the file. since_unix_s: one that was last touched before is of an earlier life and says nothing."""

    source = "file"
    every_s = 1.0

    def __init__(self, path: str | Path, lead_s: float, *, since_unix_s: float) -> None:
        self._path, self._lead_s, self._since_unix_s = Path(path), lead_s, since_unix_s
        self._seen: Notice | None = None

    def look(self) -> Notice | None:
        try:
            with open(self._path, "rb") as file:
                touched_unix_s = os.fstat(file.fileno()).st_mtime
                text = file.read(_MOST_BYTES)
        except FileNotFoundError:
            self._seen = None
            return None
        if touched_unix_s < self._since_unix_s:
            return None
        deadline_unix_s, is_dated = read_message(text, said_unix_s=touched_unix_s, lead_s=self._lead_s)
        if self._seen is None or self._seen.deadline_unix_s != deadline_unix_s:
            self._seen = Notice(self.source, deadline_unix_s, time.time(), is_dated)
        return self._seen


def read_message(text: bytes, *, said_unix_s: float, lead_s: float) -> tuple[float, bool]:
    """The deadline that a message names, and whether it does name one. Raises ValueError."""
    if not text.strip():
        return said_unix_s + lead_s, False
    body = json.loads(text)
    if isinstance(body, dict) and "at" in body:
        return utc_unix_s(str(body["at"])), True
    if isinstance(body, dict) and type(body.get("in_s")) in {int, float} and 0 <= body["in_s"] < 1e9:
        return said_unix_s + body["in_s"], True
    raise ValueError(f'{text[:100]!r} is no notice: empty, {{"in_s": 60}} or {{"at": "2026-11-21T08:22:00Z"}}')
