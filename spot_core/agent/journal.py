"""What trainer and agent tell each other through the local tier's `journal/` folder.

    000003.progress      trainer -> anyone: step, useful seconds, failed commits; survives SIGKILL of the trainer
    000003.outcome.json  trainer -> agent: how the trainer ended, if it could say so
    000003.cadence.json  trainer -> anyone: what the interval follows from, at the last checkpoint
    000003.agent.json    agent -> trainer: what is durable, what is being drained, the last failure
    000003.notice.json   agent -> trainer: the notice that stands, apart since a drain that hangs must not hold it up

Each file has one writer. The JSON files are replaced whole; no fsync, since they matter only on this boot. What the
local folder does not take, since it is full or gone, goes to the overflow; of two the newer one counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spot_core.notice.notice import Notice
from spot_core.store import layout
from spot_core.store.overflow import Overflow

_TEXT_BYTES = 480
_PROGRESS = struct.Struct(f"<qdqq{_TEXT_BYTES}s{_TEXT_BYTES}s")
_SHORTEST = struct.calcsize("<qdq")


@dataclass(frozen=True, slots=True)
class Progress:
    """Where training is: last completed step, useful seconds over all lives, step this life resumed from.

    failures: checkpoints of this life that could not be committed locally. failure: why, if the last one could not.
    remote_only: why checkpoints go to the remote without the local disk, empty if they do not.
    """

    step: int
    useful_s: float
    resumed_step: int
    failures: int = 0
    failure: str = ""
    remote_only: str = ""

    def pack(self) -> bytes:
        texts = (self.failure.encode(), self.remote_only.encode())
        return _PROGRESS.pack(self.step, self.useful_s, self.resumed_step, self.failures, *texts)

    @classmethod
    def unpack(cls, data: bytes) -> Progress:
        """Raises struct.error. Shorter ones, of an earlier release on this boot, counted no failures."""
        if len(data) < _SHORTEST:
            raise struct.error(f"{len(data)} bytes are no progress")
        full = data[: _PROGRESS.size].ljust(_PROGRESS.size, b"\0")
        step, useful_s, resumed_step, failures, *texts = _PROGRESS.unpack(full)
        return cls(step, useful_s, resumed_step, failures, *(_text(text) for text in texts))


@dataclass(slots=True)
class AgentStatus:
    """The agent's side of the journal.

    durable: names committed and verified on the remote, as far as this agent knows.

    failures, last_failure: of drains, and of local commits as the trainer reports them; is_drain_failing tells which.
    drained: checkpoint name -> seconds from local commit to durable on the remote (the last ones of this life).
    newest_durable: newest name committed and verified on the remote. draining: name being uploaded now.
    hinted_unix_s: when the provider said that this instance is in danger, None if it did not.
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
    durable: list[str] = field(default_factory=list)
    is_drain_failing: bool = False
    hinted_unix_s: float | None = None


class Journal:
    """The journal of one life."""

    def __init__(self, root: Path, incarnation: int, overflow: Overflow | None = None) -> None:
        self._folder = root / layout.JOURNAL
        self._overflow = overflow or Overflow(None)
        self._stem = f"{incarnation:06d}"
        self._descriptor: int | None = None

    def _file(self, suffix: str) -> Path:
        return self._folder / f"{self._stem}.{suffix}"

    def open_progress(self, progress: Progress) -> None:
        """Trainer: create the progress file, again if it is gone. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(self._file("progress"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        if self._descriptor is None:
            self._descriptor = opened
        else:
            # The same number goes on: the training thread may be about to write to it.
            os.dup2(opened, self._descriptor, inheritable=False)
            os.close(opened)
        self.write_progress(progress)

    def write_progress(self, progress: Progress) -> None:
        """Trainer: one write, over the same bytes; the page cache keeps it when the process is killed.

        Not a memory map: on a disk that is full, gone or read-only a store to one ends the process with SIGBUS.
        """
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._descriptor, progress.pack(), 0)

    def has_progress(self) -> bool:
        """Trainer: whether what it writes is what others read."""
        try:
            return self._descriptor is not None and os.path.samestat(
                os.fstat(self._descriptor), os.stat(self._file("progress"))
            )
        except OSError:
            return False

    def close(self) -> None:
        """Trainer: no more progress is written."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def read_progress(self) -> Progress | None:
        try:
            return Progress.unpack(self._file("progress").read_bytes())
        except (OSError, struct.error):
            return None

    def write_outcome(self, outcome: str) -> None:
        """Trainer: how it ended. Raises OSError if neither place takes it."""
        self._write("outcome.json", {"outcome": outcome})

    def read_outcome(self) -> str | None:
        body = self._read("outcome.json")
        return str(body["outcome"]) if body else None

    def write_cadence(self, record: dict[str, Any]) -> None:
        """Trainer: where its cadence stands. Nothing depends on it: it is left out where neither place takes it."""
        with contextlib.suppress(OSError):
            self._write("cadence.json", record)

    def read_cadence(self) -> dict[str, Any] | None:
        return self._read("cadence.json")

    def write_status(self, status: AgentStatus) -> bool:
        """Agent: returns whether it is in the local folder. Raises OSError if neither place takes it."""
        return self._write("agent.json", asdict(status))

    def read_status(self) -> AgentStatus | None:
        body = self._read("agent.json")
        return AgentStatus(**{slot: body[slot] for slot in AgentStatus.__slots__ if slot in body}) if body else None

    def write_notice(self, notice: Notice | None) -> None:
        """Agent: the notice that stands now. Raises OSError if neither place takes it."""
        self._write("notice.json", {"notice": asdict(notice) if notice is not None else None})

    def read_notice(self) -> Notice | None:
        body = self._read("notice.json")
        return Notice(**body["notice"]) if body and body["notice"] else None

    @property
    def log_path(self) -> Path:
        return self._file("agent.log")

    def _write(self, suffix: str, body: dict[str, Any]) -> bool:
        try:
            _replace(self._file(suffix), body)
            return True
        except OSError:
            if self._overflow.folder is None:
                raise
        _replace(self._overflow.make().path(f"{layout.JOURNAL}/{self._stem}.{suffix}"), body)
        return False

    def _read(self, suffix: str) -> dict[str, Any] | None:
        places = [self._file(suffix)]
        if (tier := self._overflow.tier) is not None:
            places.append(tier.path(f"{layout.JOURNAL}/{self._stem}.{suffix}"))
        found = [(_written_ns(place), body) for place in places if (body := _read(place)) is not None]
        return max(found, key=lambda each: each[0])[1] if found else None


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="ignore")


def _replace(path: Path, body: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        temporary.write_text(json.dumps(body))
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _written_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _read(path: Path) -> dict[str, Any] | None:
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return body if isinstance(body, dict) else None
