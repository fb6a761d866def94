"""The ranks of one training on one machine, and the folder in its memory where they hand rank 0 their parts.

Collectives happen while the run is opened, and never again. A rank's part is what differs from rank to rank: random
state, the position in its share of the data, running metrics. The model and its optimizer are the same on all of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any

import psutil
import torch.distributed as dist

from spot_core import errors
from spot_core.errors import AgentError, ConfigError, Preempted, SpotError, TierError
from spot_core.handover import ResumePoint
from spot_core.ranks.board import Board
from spot_core.snapshot.files import BytesFile, NativeFile, SafetensorsFile, torch_bytes

_BOARD, _NONCE = "board", "nonce"
_PREFIX = "spot-ranks-"
# For rank 0 to restore a large checkpoint; where it dies, the others notice at once.
_OPENING = timedelta(hours=2)
# Ranks come to a boundary within a step of each other.
_PART_WITHIN_S = 60.0
_EVERY_S = 0.01


@dataclass(frozen=True, slots=True)
class Opened:
    """What rank 0 tells the others of the run it has opened. max_steps: of a run that is finished, which claims no
    life. leader: the process of rank 0."""

    resume: ResumePoint | None
    is_claimed: bool
    max_steps: int | None
    leader: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Why rank 0 did not open it. kind: of the error. code: with which a preempted run exits."""

    kind: str
    message: str
    code: int

    @classmethod
    def of(cls, error: BaseException) -> Failed:
        code = error.code if isinstance(error, Preempted) and isinstance(error.code, int) else 1
        return cls(type(error).__name__, str(error), code)

    def error(self) -> BaseException:
        """To be raised by another rank."""
        if self.kind == Preempted.__name__:
            return Preempted(self.code)
        kind = getattr(errors, self.kind, AgentError)
        message = f"rank 0 did not open the run: {self.message}"
        return kind(message) if issubclass(kind, SpotError) else AgentError(message)


class Team:
    """One rank's view of all of them. Make it with `form`."""

    def __init__(self, rank: int, size: int, folder: Path, group: Any, lock: int | None) -> None:
        self.rank, self.size, self.folder, self._group, self._lock = rank, size, folder, group, lock
        self.board = Board(folder / _BOARD, size)

    @classmethod
    def form(cls, rank: int, size: int) -> Team:
        """Called by all ranks at once, with torch.distributed initialised.

        Raises ConfigError on all of them if they are not on one machine.
        """
        group = dist.new_group(backend="gloo", timeout=_OPENING)
        folder, lock, nonce = _make_folder(size) if rank == 0 else (None, None, None)
        folder, nonce = _broadcast((folder, nonce), group)
        team, failure = None, ""
        try:
            if (folder / _NONCE).read_text() != nonce:
                raise FileNotFoundError(f"{folder} is another one")
            team = cls(rank, size, folder, group, lock)
        except OSError as error:
            failure = f"rank {rank} does not see the folder of rank 0 ({error})"
        failures: list[str] = [""] * size
        dist.all_gather_object(failures, failure, group=group)
        if team is None or any(failures):
            if rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise ConfigError(
                f"SpotCallback does not work with training on several machines yet: {next(filter(None, failures))}. "
                "Nothing was written. Train on one machine; in containers, let all ranks share /dev/shm."
            )
        return team

    def tell(self, word: Opened | Failed) -> None:
        """Rank 0, once: how opening the run went."""
        _broadcast(word, self._group)
        self._end_collectives()

    def told(self) -> Opened:
        """Another rank, once: wait until rank 0 has opened the run. Raises what kept it from that."""
        word = _broadcast(None, self._group)
        self._end_collectives()
        if isinstance(word, Failed):
            self.close()
            raise word.error()
        assert isinstance(word, Opened)
        return word

    def hand_over(self, step: int, files: Sequence[NativeFile]) -> None:
        """Another rank: its part of the checkpoint of `step`, as it is now. Raises OSError."""
        part = self.folder / f"{step}"
        part.mkdir(exist_ok=True)
        for file in files:
            if file.is_part:
                target = part / self._named(file, self.rank).replace("/", "%")
                temporary = target.with_name(f"{target.name}.tmp")
                temporary.write_bytes(_content(file))
                os.replace(temporary, target)

    def complete(self, step: int, files: Sequence[NativeFile]) -> list[NativeFile]:
        """Rank 0: the checkpoint's files with the parts of all ranks, which are waited for when they are written."""
        for old in self.folder.iterdir():
            if old.name.isdigit() and int(old.name) < step:
                shutil.rmtree(old, ignore_errors=True)
        found: list[NativeFile] = []
        for file in files:
            if not file.is_part:
                found.append(file)
                continue
            found.append(replace(file, path=self._named(file, 0)))
            found += [self._part(step, self._named(file, rank), rank) for rank in range(1, self.size)]
        return found

    def _named(self, file: NativeFile, rank: int) -> str:
        return named(file.path, rank, size=self.size)

    def _part(self, step: int, path: str, rank: int) -> BytesFile:
        target = self.folder / f"{step}" / path.replace("/", "%")

        def content() -> bytes:
            until = time.monotonic() + _PART_WITHIN_S
            while not target.exists():
                if time.monotonic() > until:
                    raise TierError(f"rank {rank} did not hand over its part within {_PART_WITHIN_S:.0f} s")
                time.sleep(_EVERY_S)
            return target.read_bytes()

        return BytesFile(path=path, content=content)

    def close(self) -> None:
        """Let go; rank 0 removes the folder."""
        self.board.close()
        if self._lock is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    def _end_collectives(self) -> None:
        dist.destroy_process_group(self._group)
        self._group = None


def named(path: str, rank: int, *, size: int) -> str:
    """The name of a rank's own file in a checkpoint. Of several ranks' `rng_state.pth` the second one's is
    `rng_state_1.pth`, as the Trainer has it."""
    plain = PurePosixPath(path)
    if size == 1:
        return path
    return str(plain.with_name(f"{plain.stem}_{rank}{plain.suffix}"))


def has_ended(pid: int) -> bool:
    """Whether that process is over, be it that nobody has asked how it ended."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _content(file: NativeFile) -> bytes:
    if isinstance(file, BytesFile):
        return file.content()
    assert not isinstance(file, SafetensorsFile)
    return torch_bytes(file.tree)


def _broadcast(value: Any, group: Any) -> Any:
    """What rank 0 gave, on all ranks."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def _make_folder(size: int) -> tuple[Path, int, str]:
    """A folder in memory that only this user sees, the lock on it, and a word by which others know it again."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    _remove_left(place)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    nonce = secrets.token_hex(16)
    (folder / _NONCE).write_text(nonce)
    Board.create(folder / _BOARD, size)
    return folder, lock, nonce


def _remove_left(place: Path) -> None:
    """Folders of ranks 0 that were killed: nobody holds their lock."""
    for left in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_uid == os.getuid():
                    shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)
