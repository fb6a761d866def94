"""What trainer and agent tell each other through the local tier's `journal/` folder.

    000003.progress      trainer -> anyone, memory-mapped: step, useful seconds; survives SIGKILL of the trainer
    000003.outcome.json  trainer -> agent: how the trainer ended, if it could say so
    000003.agent.json    agent -> trainer: what is durable, what is being drained, the last failure

Each file has one writer. The JSON files are replaced whole; no fsync, since they matter only on this boot.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spot_core.store import layout

_PROGRESS = struct.Struct("<qdq")


@dataclass(frozen=True, slots=True)
class Progress:
    """Where training is: last completed step, useful seconds over all lives, step this life resumed from."""

    step: int
    useful_s: float
    resumed_step: int


@dataclass(slots=True)
class AgentStatus:
    """The agent's side of the journal.

    drained: checkpoint name -> seconds from local commit to durable on the remote (the last ones of this life).
    newest_durable: newest name committed and verified on the remote. draining: name being uploaded now.
    """

    pid: int = 0
    newest_durable: str | None = None
    draining: str | None = None
    done_bytes: int = 0
    total_bytes: int = 0
    pending: int = 0
    drained: dict[str, float] = field(default_factory=dict)
    failures: int = 0
    last_failure: str | None = None
    fence: str | None = None
    is_finished: bool = False


class Journal:
    """The journal of one life."""

    def __init__(self, root: Path, incarnation: int) -> None:
        self._folder = root / layout.JOURNAL
        self._stem = f"{incarnation:06d}"
        self._progress: mmap.mmap | None = None

    def _file(self, suffix: str) -> Path:
        return self._folder / f"{self._stem}.{suffix}"

    def open_progress(self, progress: Progress) -> None:
        """Trainer: create the progress map."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._file("progress"), "w+b") as file:
            file.truncate(_PROGRESS.size)
            self._progress = mmap.mmap(file.fileno(), _PROGRESS.size)
        self.write_progress(progress)

    def write_progress(self, progress: Progress) -> None:
        """Trainer: a store to memory; the page cache keeps it when the process is killed."""
        if self._progress is not None:
            _PROGRESS.pack_into(self._progress, 0, progress.step, progress.useful_s, progress.resumed_step)

    def read_progress(self) -> Progress | None:
        try:
            return Progress(*_PROGRESS.unpack(self._file("progress").read_bytes()[: _PROGRESS.size]))
        except (OSError, struct.error):
            return None

    def write_outcome(self, outcome: str) -> None:
        _replace(self._file("outcome.json"), {"outcome": outcome})

    def read_outcome(self) -> str | None:
        body = _read(self._file("outcome.json"))
        return str(body["outcome"]) if body else None

    def write_status(self, status: AgentStatus) -> None:
        _replace(self._file("agent.json"), asdict(status))

    def read_status(self) -> AgentStatus | None:
        body = _read(self._file("agent.json"))
        return AgentStatus(**{slot: body[slot] for slot in AgentStatus.__slots__ if slot in body}) if body else None

    @property
    def log_path(self) -> Path:
        return self._file("agent.log")


def _replace(path: Path, body: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        temporary.write_text(json.dumps(body))
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _read(path: Path) -> dict[str, Any] | None:
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return body if isinstance(body, dict) else None
