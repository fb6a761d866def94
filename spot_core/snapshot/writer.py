"""The writer: turns a snapshot into native files on the local tier and commits them. One thread, one at a time.

Each byte is digested while it is hot, on its way to the file. A failure never reaches the training thread as an
exception: it is logged once per cause, counted and reported through `on_done`; the next checkpoint tries again.
A folder that is removed under a write, or a disk that refuses it, costs a second attempt, since the snapshot is still
in memory.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from spot_core.errors import FencedError, SpotError, TierError, is_full
from spot_core.snapshot.capture import Snapshot, Snapshotter
from spot_core.snapshot.files import NativeFile, SafetensorsFile, TorchFile, pieces, tensor_bytes
from spot_core.snapshot.loading import load_inert
from spot_core.snapshot.trees import same_bits
from spot_core.store import incarnation
from spot_core.store.digesting import DigestingFile
from spot_core.store.manifest import Manifest
from spot_core.store.posix import PosixTier

logger = logging.getLogger(__name__)

# Called before each attempt with the manifest to be, about how many bytes come, and the failure if the disk refused an
# attempt before; returns where they have room, raises if they must not be written.
Prepare = Callable[[Manifest, int, OSError | None], PosixTier]

# A cause that is overcome and comes back is told again after this long.
_TELL_AGAIN_S = 600.0
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ESTALE}


@dataclass(frozen=True, slots=True)
class Written:
    """Outcome of one checkpoint: its manifest and seconds taken, or the error that prevented it."""

    manifest: Manifest
    seconds: float
    error: Exception | None = None

    @property
    def failure(self) -> str:
        """The error in words, empty if there was none."""
        error = self.error
        if error is None:
            return ""
        what = error.strerror if isinstance(error, SpotError) and isinstance(error, OSError) else None
        return f"checkpoint of step {self.manifest.step} not written ({what or f'{type(error).__name__}: {error}'})"


class CheckpointWriter:
    """Commits snapshots of one incarnation to the local tier."""

    def __init__(
        self, tier: PosixTier, snapshotter: Snapshotter, *, number: int, prepare: Prepare | None = None
    ) -> None:
        self._tier, self._snapshotter, self._number = tier, snapshotter, number
        self._prepare = prepare or self._stay
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="spot-writer")
        self._current: Future[None] | None = None
        self._is_first = True
        self._last_bytes = 0
        self._told_at: dict[str, float] = {}
        self._failed_in_a_row = 0
        self._is_told = False
        self.failures = 0

    @property
    def is_busy(self) -> bool:
        """Whether a snapshot is still being written: its host buffers are in use."""
        return self._current is not None and not self._current.done()

    def submit(self, snapshot: Snapshot, manifest: Manifest, on_done: Callable[[Written], None]) -> None:
        """Write and commit in the background. manifest: complete but for its files."""
        self._current = self._pool.submit(self._write, snapshot, manifest, on_done)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the snapshot being written; returns whether it is."""
        if self._current is None:
            return True
        if not wait([self._current], timeout_s).done:
            return False
        self._current.result()
        return True

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _write(self, snapshot: Snapshot, manifest: Manifest, on_done: Callable[[Written], None]) -> None:
        began = time.perf_counter()
        try:
            files = snapshot.ready.result()
            self._snapshotter.wait_for_device()
            try:
                manifest = self._commit(files, manifest)
            except (FileNotFoundError, NotADirectoryError) as error:
                logger.debug("%s was removed while it was written, once more: %s", manifest.name, error)
                manifest = self._commit(files, manifest)
            except _DiskRefusedError as error:
                logger.debug("the disk refused %s, once more: %s", manifest.name, error)
                manifest = self._commit(files, manifest, error.failure)
            written = Written(manifest, time.perf_counter() - began)
            self._succeeded()
        except Exception as error:
            written = Written(manifest, time.perf_counter() - began, error)
            self._failed(written)
        finally:
            snapshot.written.set()
        on_done(written)

    def _commit(self, files: list[NativeFile], manifest: Manifest, failure: OSError | None = None) -> Manifest:
        # What was written last also counts what tensors do not: headers, the trainer's own records.
        tier = self._prepare(manifest, max(self._last_bytes, sum(map(tensor_bytes, files))), failure)
        try:
            return self._commit_to(tier, files, manifest)
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            if failure is None and tier is self._tier:
                raise _DiskRefusedError(error) from error
            raise

    def _commit_to(self, tier: PosixTier, files: list[NativeFile], manifest: Manifest) -> Manifest:
        staged = tier.stage(manifest.name)
        try:
            with contextlib.ExitStack() as opened:
                targets = [(file.path, _write_file(staged, file, opened)) for file in files]
                manifest = replace(manifest, files=tuple(target.durable(path) for path, target in targets))
            if self._is_first:
                _load_back(staged, files)
                self._is_first = False
            self._check_fence(tier)
            _check_whole(staged, manifest)
            tier.commit(staged, manifest)
        except Exception:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        self._last_bytes = manifest.total_bytes
        return manifest

    def _stay(self, manifest: Manifest, expected_bytes: int, failure: OSError | None) -> PosixTier:
        if failure is not None:
            raise failure
        return self._tier

    def _check_fence(self, tier: PosixTier) -> None:
        try:
            incarnation.check_fence(self._tier, self._number)
        except TierError:
            if tier is self._tier:
                raise  # elsewhere it may be the very reason for it; the agent looks at the remote's fence

    def _succeeded(self) -> None:
        if self._is_told:
            logger.info("checkpoints are written again, after %d that were not", self._failed_in_a_row)
        self._failed_in_a_row, self._is_told = 0, False
        forget_before = time.monotonic() - _TELL_AGAIN_S
        self._told_at = {cause: told_at for cause, told_at in self._told_at.items() if told_at > forget_before}

    def _failed(self, written: Written) -> None:
        self.failures += 1
        error = written.error
        if isinstance(error, FencedError):
            return  # stops the training thread, with its own message
        self._failed_in_a_row += 1
        cause = _cause(error)
        if cause not in self._told_at:
            self._told_at[cause] = time.monotonic()
            self._is_told = True
            logger.error(
                "%s; training goes on, nothing that was committed was touched, the next one is tried as usual%s",
                written.failure,
                ". Free space there or, for the next life, set local= (SPOT_LOCAL) to a larger disk of this instance"
                if cause == "full"
                else "",
            )


def _write_file(staged: Path, file: NativeFile, opened: contextlib.ExitStack) -> DigestingFile:
    """Write one file, which is not durable yet and stays open for as long as `opened`."""
    # Never the staging folder itself: were it removed meanwhile, the files before this one would be missing.
    for folder in reversed(Path(file.path).parents):
        if folder != Path("."):
            (staged / folder).mkdir(exist_ok=True)
    target = opened.enter_context(DigestingFile(staged / file.path))
    for piece in pieces(file):
        target.write(piece)
    target.flush()
    return target


class _DiskRefusedError(Exception):
    """The local disk took only a part. failure: of the write."""

    def __init__(self, failure: OSError) -> None:
        super().__init__(str(failure))
        self.failure = failure


def _cause(error: Exception | None) -> str:
    """What makes two failures one for the user, wherever in a commit each was noticed."""
    if not isinstance(error, OSError) or error.errno is None:
        return type(error).__name__
    return "full" if is_full(error) else "gone" if error.errno in _GONE else str(error.errno)


def _check_whole(staged: Path, manifest: Manifest) -> None:
    """Raise FileNotFoundError if somebody removed what was just written."""
    for file in manifest.files:
        path = staged / file.path
        if path.stat().st_size != file.bytes:
            raise FileNotFoundError(errno.ENOENT, "another size than was written", str(path))


def _load_back(staged: Path, files: list[NativeFile]) -> None:
    """Load the first checkpoint of a life as a resume would, and compare: a state that cannot be restored must be
    known in the first minute, not after the first kill."""
    from safetensors import safe_open

    for file in files:
        path = staged / file.path
        if isinstance(file, TorchFile) and file.inert_keys is not None:
            load_inert(path, inert_keys=file.inert_keys)
        elif isinstance(file, TorchFile):
            with _restorable_globals():
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        elif isinstance(file, SafetensorsFile):
            with safe_open(path, framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118
                    if not same_bits(stored.get_tensor(key), file.tensors[key]):
                        raise ValueError(f"{file.path}: tensor {key} does not read back as it was captured")


def _restorable_globals() -> torch.serialization.safe_globals:
    """What trainers allow beside tensors: numpy's arrays, in random states."""
    import numpy as np

    core = np._core if hasattr(np, "_core") else np.core  # renamed in numpy 2
    return torch.serialization.safe_globals(
        [core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    )
