"""The ranks of one training on one machine, and the folder in its memory where they hand rank 0 their parts.

Two collectives form the team, and none happens later: the others wait for rank 0 to open the run by looking for its
word in the folder, so that a long restore meets no time limit of collectives. A rank's part is what differs from rank
to rank: random state, the position in its share of the data, running metrics. The model and its optimizer are the same
on all of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch.distributed as dist

from spot_core import errors
from spot_core.errors import AgentError, ConfigError, Preempted, SpotError, TierError
from spot_core.handover import ResumePoint
from spot_core.ranks.board import Board
from spot_core.snapshot.files import BytesFile, NativeFile, SafetensorsFile, torch_bytes
from spot_core.snapshot.trees import rebuild
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest

# In the folder: the board, what it is known by, rank 0's lock for as long as its process lives, its word.
_BOARD, _NONCE, _LEADER, _WORD = "board", "nonce", "leader", "word"
_PREFIX = "spot-ranks-"
# Ranks come to a boundary within a step of each other, but for validations that take longer on one of them.
_PART_WITHIN_S = 600.0
_EVERY_S = 0.01
# Others look for rank 0's word all the time.
_HEARD_WITHIN_S = 10.0
# A folder that is younger may be about to be locked.
_FRESH_S = 60.0


@dataclass(frozen=True, slots=True)
class Opened:
    """What rank 0 tells the others of the run it has opened. max_steps: of a run that is finished, which claims no
    life."""

    resume: ResumePoint | None
    is_claimed: bool
    max_steps: int | None

    def to_json(self) -> dict[str, Any]:
        point = self.resume
        found = None
        if point is not None:
            found = {
                "name": str(point.manifest.name),
                "manifest": point.manifest.to_json().decode(),
                "folder": str(point.folder),
                "source": point.source,
                "pinned": str(point.pinned) if point.pinned is not None else None,
            }
        return {"resume": found, "is_claimed": self.is_claimed, "max_steps": self.max_steps}

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> Opened:
        point, found = None, body["resume"]
        if found is not None:
            name = CheckpointName.parse(found["name"])
            assert name is not None
            manifest = Manifest.from_json(found["manifest"].encode(), name=name)
            pinned = Path(found["pinned"]) if found["pinned"] is not None else None
            point = ResumePoint(manifest, Path(found["folder"]), found["source"], pinned)
        return cls(point, body["is_claimed"], body["max_steps"])


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

    def __init__(self, rank: int, size: int, folder: Path) -> None:
        self.rank, self.size, self.folder = rank, size, folder
        self._has_told = False
        self.board = Board(folder / _BOARD, size)
        self._leader = os.open(folder / _LEADER, os.O_RDWR | os.O_CLOEXEC)
        if rank == 0:
            # Until this process ends, not until `close`. Of this process alone: workers that it forks do not hold it.
            fcntl.lockf(self._leader, fcntl.LOCK_EX)

    @classmethod
    def form(cls, rank: int, size: int) -> Team:
        """Called by all ranks at once, with torch.distributed initialised.

        Raises ConfigError on all of them if they are not on one machine.
        """
        box = [_make_folder(size) if rank == 0 else None]
        dist.broadcast_object_list(box, src=0)
        assert box[0] is not None
        folder, nonce = box[0]
        team, failure = None, ""
        try:
            if (folder / _NONCE).read_text() != nonce:
                raise FileNotFoundError(f"{folder} is another one")
            team = cls(rank, size, folder)
        except OSError as error:
            failure = f"rank {rank} does not see the folder of rank 0 ({error})"
        failures: list[str] = [""] * size
        dist.all_gather_object(failures, failure)
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
        body = {"failed": asdict(word)} if isinstance(word, Failed) else {"opened": word.to_json()}
        _write(self.folder / _WORD, json.dumps(body).encode())
        self._has_told = True

    def told(self) -> Opened:
        """Another rank, once: wait until rank 0 has opened the run. Raises what kept it from that."""
        path = self.folder / _WORD
        while not path.exists():
            if self.has_leader_ended():
                raise AgentError("rank 0 ended before it had opened the run; nothing was changed here")
            time.sleep(_EVERY_S)
        word = json.loads(path.read_bytes())
        self._heard(self.rank).touch()
        if "failed" in word:
            self.close()
            raise Failed(**word["failed"]).error()
        return Opened.from_json(word["opened"])

    @property
    def is_over(self) -> bool:
        """Whether rank 0 has let go."""
        return not self.folder.exists()

    def has_leader_ended(self) -> bool:
        """Another rank: whether the process of rank 0 is over."""
        try:
            fcntl.lockf(self._leader, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def hand_over(self, step: int, files: Sequence[NativeFile]) -> None:
        """Another rank: its part of the checkpoint of `step`, as it is now. Raises OSError."""
        part = self.folder / f"{step}"
        part.mkdir(parents=True, exist_ok=True)  # whoever tidies up memory may have taken the folder too
        for file in files:
            if file.is_part:
                _write(part / self._named(file, self.rank).replace("/", "%"), _content(file))

    def complete(self, step: int, files: Sequence[NativeFile]) -> list[NativeFile]:
        """Rank 0: the checkpoint's files with the parts of all ranks, which are waited for when they are written."""
        with contextlib.suppress(OSError):
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

    def _heard(self, rank: int) -> Path:
        return self.folder / f"{_WORD}-{rank}"

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
        """Let go; rank 0 removes the folder when its word was heard."""
        self.board.close()
        if self._has_told:
            until = time.monotonic() + _HEARD_WITHIN_S
            while not all(self._heard(rank).exists() for rank in range(1, self.size)) and time.monotonic() < until:
                time.sleep(_EVERY_S)
            shutil.rmtree(self.folder, ignore_errors=True)


def named(path: str, rank: int, *, size: int) -> str:
    """The name of a rank's own file in a checkpoint. Of several ranks' `rng_state.pth` the second one's is
    `rng_state_1.pth`, as the Trainer has it."""
    plain = PurePosixPath(path)
    if size == 1:
        return path
    return str(plain.with_name(f"{plain.stem}_{rank}{plain.suffix}"))


def _content(file: NativeFile) -> bytes:
    if isinstance(file, BytesFile):
        return file.content()
    assert not isinstance(file, SafetensorsFile)
    return torch_bytes(rebuild(file.tree, lambda tensor: tensor.detach().cpu()))


def _write(path: Path, content: bytes) -> None:
    """Whole, for whoever sees it."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _make_folder(size: int) -> tuple[Path, str]:
    """A folder in memory that only this user sees, and a word by which others know it again."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    _remove_left(place)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    return folder, furnish(folder, size)


def furnish(folder: Path, size: int) -> str:
    """Put into an empty folder what a Team expects there; returns the word by which it is known. Raises OSError."""
    nonce = secrets.token_hex(16)
    (folder / _NONCE).write_text(nonce)
    Board.create(folder / _BOARD, size)
    (folder / _LEADER).touch()
    return nonce


def _remove_left(place: Path) -> None:
    """Folders of ranks 0 that were killed: nobody holds their lock."""
    for left in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if left.lstat().st_uid != os.getuid() or time.time() - left.lstat().st_mtime < _FRESH_S:
                continue
            with contextlib.suppress(FileNotFoundError), open(left / _LEADER, "r+b") as leader:
                fcntl.lockf(leader, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
