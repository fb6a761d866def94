"""`spot restore`: the native part of a checkpoint in a folder of the user's choice, for stock tools to load.

Atomic: downloaded and verified beside its place, fsynced, then renamed. What is in the folder already is not
touched. Without an explicit choice a damaged checkpoint is reported and the next older one is tried, as in a resume.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from spot_core.errors import ConfigError, CorruptCheckpointError, TierError
from spot_core.report.units import size
from spot_core.store import catalog, resume
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import FileRecord, Manifest
from spot_core.store.posix import fsync_folder
from spot_core.store.resume import OnProgress
from spot_core.store.tier import Tier

logger = logging.getLogger(__name__)

_PREFIX = ".spot-restore-"
ProgressBar = Callable[[], contextlib.AbstractContextManager[OnProgress]]


@dataclass(frozen=True, slots=True)
class RestoredNative:
    """A verified checkpoint and where its native part lies now."""

    manifest: Manifest
    path: Path


def restore(tier: Tier, folder: Path, *, choice: CheckpointName | None, progress_bar: ProgressBar) -> RestoredNative:
    """Bring the chosen or the newest valid checkpoint's native part to `folder`.

    progress_bar: opened once for each checkpoint that is tried.
    Raises ConfigError (something is in the way, no room, no checkpoint), CorruptCheckpointError (the chosen one is
    damaged, or all are), TierError.
    """
    names = [choice] if choice is not None else catalog.names(tier)
    if not names:
        raise ConfigError(f"{tier.url} holds no checkpoint yet: nothing was restored")
    reasons = []
    for name in names:
        try:
            manifest = _manifest(tier, name)
            resume.check_sizes(tier, manifest)
            return RestoredNative(manifest, _bring(tier, manifest, folder, progress_bar))
        except CorruptCheckpointError as error:
            reasons.append(str(error))
            if name != names[-1]:
                logger.warning("checkpoint %s is damaged, trying the next older one: %s", name, error)
    which = f"checkpoint {choice} is damaged" if choice else f"{tier.url}: none of its checkpoints is valid"
    raise CorruptCheckpointError(f"{which}, nothing was restored:\n  " + "\n  ".join(reasons))


def choose(tier: Tier, *, checkpoint: str | None, step: int | None) -> CheckpointName | None:
    """The checkpoint meant by `--checkpoint` or `--step`, None if neither is given. Raises ConfigError."""
    if checkpoint is None and step is None:
        return None
    if checkpoint is not None and step is not None:
        raise ConfigError("--checkpoint and --step exclude each other: give one of them")
    names = catalog.names(tier)
    for name in names:  # newest first: of two lives that both came to this step, the later one counts
        if str(name) == checkpoint or name.step == step:
            return name
    wanted = f"checkpoint {checkpoint}" if checkpoint is not None else f"checkpoint of step {step}"
    there = ", ".join(map(str, names)) or "none"
    raise ConfigError(f"{tier.url} holds no {wanted}. Stored: {there}")


def how_to_load(restored: RestoredNative) -> str:
    """One line of code that loads a native checkpoint with the tools it was made for."""
    path = restored.path
    if (path / "adapter_config.json").is_file():
        return f'PeftModel.from_pretrained(base_model, "{path}")'
    if (path / "trainer_state.json").is_file():
        return f'trainer.train(resume_from_checkpoint="{path}")'
    if path.suffix == ".ckpt" and restored.manifest.base_fingerprint is not None:
        return f'MyModule.load_from_checkpoint("{path}", strict=False): the frozen base is not part of it'
    if path.suffix == ".ckpt":
        return f'trainer.fit(model, ckpt_path="{path}")'
    return f'torch.load("{path}")' if path.is_file() else f"the files in {path}, as the script that wrote them does"


def _manifest(tier: Tier, name: CheckpointName) -> Manifest:
    try:
        return catalog.read_manifest(tier, name)
    except FileNotFoundError as error:
        raise CorruptCheckpointError(f"manifest {name} vanished from {tier.url}") from error


def _bring(tier: Tier, manifest: Manifest, folder: Path, progress_bar: ProgressBar) -> Path:
    native = PurePosixPath(manifest.native)
    files = [file for file in manifest.files if PurePosixPath(file.path).is_relative_to(native)]
    if not native.parts or not files:
        raise CorruptCheckpointError(f"manifest {manifest.name} lists no file of its native part {manifest.native!r}")
    target = folder / native.name
    _check_free(target)
    _make_room(folder, files)
    staging = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
    try:
        # One level down: mkdtemp's own folder is for its owner's eyes only, the checkpoint is not.
        staged = staging / native.name
        targets = [staged / PurePosixPath(file.path).relative_to(native) for file in files]
        with progress_bar() as on_progress:
            resume.download_files(manifest, tier, targets, on_progress, files=files)
        for below, _, _ in os.walk(staged):
            fsync_folder(Path(below))
        _check_free(target)  # a rename would replace a file that came meanwhile
        os.replace(staged, target)
        fsync_folder(folder)
    except OSError as error:
        if isinstance(error, TierError):
            raise
        raise ConfigError(f"cannot write {target}: {error.strerror or error}; nothing was restored") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _check_free(target: Path) -> None:
    is_empty_folder = target.is_dir() and not any(target.iterdir())
    if os.path.lexists(target) and not is_empty_folder:
        raise ConfigError(f"{target} exists and is left as it is: choose another folder, or move it away")


def _make_room(folder: Path, files: list[FileRecord]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        leftovers = sorted(folder.glob(f"{_PREFIX}*"))
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror or error}; nothing was restored") from error
    if leftovers:
        logger.warning(
            "%s holds what an interrupted restore left, unless one is running now; it can be deleted: %s",
            folder,
            ", ".join(leftover.name for leftover in leftovers),
        )
    needed_bytes = sum(file.bytes for file in files)
    if needed_bytes > free_bytes:
        raise ConfigError(
            f"{folder} has {size(free_bytes)} free, the checkpoint needs {size(needed_bytes)}; nothing was restored"
        )
