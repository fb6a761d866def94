"""Choosing what to resume from: the newest valid checkpoint, from the nearest tier that has it whole.

No byte is used that was not verified. A damaged copy is reported by name and the other tier, then the next older
checkpoint is tried. The chosen checkpoint ends up committed on the local tier.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from spot_core.errors import CommitUnknownError, CorruptCheckpointError, TierDeniedError, TierError
from spot_core.store import layout
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import FileRecord, Manifest
from spot_core.store.posix import PosixTier
from spot_core.store.tier import OnBytes, Tier, check_record, digest_file

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Restored:
    """A verified checkpoint on the local tier, and the tier its bytes came from (`local` or `remote`)."""

    manifest: Manifest
    source: str


def names(tier: Tier) -> list[CheckpointName]:
    """Every committed checkpoint of a tier, newest first: one LIST."""
    found = map(layout.committed, tier.list(layout.MANIFESTS))
    return sorted((name for name in found if name is not None), reverse=True)


def completions(tier: Tier) -> dict[CheckpointName, int | None]:
    """Checkpoints at which training ended, with the number of steps it was to last."""
    found: dict[CheckpointName, int | None] = {}
    for entry in tier.list(layout.MANIFESTS):
        name = layout.completed(entry)
        if name is not None:
            try:
                found[name] = json.loads(tier.read(f"{layout.MANIFESTS}/{entry}")).get("max_steps")
            except (ValueError, AttributeError, FileNotFoundError) as error:
                logger.warning("%s/%s is not readable and is ignored: %r", layout.MANIFESTS, entry, error)
    return found


def mark_complete(tier: Tier, name: CheckpointName, max_steps: int | None) -> None:
    """Record that training ended at a committed checkpoint."""
    tier.create(layout.completion(name), (json.dumps({"max_steps": max_steps}) + "\n").encode())


def read_manifest(tier: Tier, name: CheckpointName) -> Manifest:
    """Raises FileNotFoundError or CorruptCheckpointError."""
    return Manifest.from_json(tier.read(layout.manifest(name)), name=name)


def verify(tier: Tier, manifest: Manifest) -> None:
    """Read back every file of a committed checkpoint. Raises CorruptCheckpointError naming the first bad one."""
    problems = damaged_files(tier, manifest, lambda _: None)
    if problems:
        raise CorruptCheckpointError(problems[0])


def damaged_files(tier: Tier, manifest: Manifest, on_bytes: OnBytes) -> list[str]:
    """Read back every file of a committed checkpoint; one sentence for each that is missing or differs.

    on_bytes is called from several threads, once a file. Raises TierError if the tier cannot be read.
    """
    return list(damages(tier, manifest, on_bytes).values())


def damages(tier: Tier, manifest: Manifest, on_bytes: OnBytes) -> dict[FileRecord, str]:
    """As `damaged_files`, with the record of each damaged file."""
    folder = layout.checkpoint(manifest.name)

    def check(file: FileRecord) -> str | None:
        try:
            check_record(tier.record(f"{folder}/{file.path}"), file, f"{tier.url}/{folder}")
        except FileNotFoundError:
            return f"{tier.url}/{folder}/{file.path} is missing"
        except CorruptCheckpointError as error:
            return str(error)
        finally:
            on_bytes(file.bytes)
        return None

    with ThreadPoolExecutor(4) as pool:
        found = zip(manifest.files, pool.map(check, manifest.files), strict=True)
        return {file: problem for file, problem in found if problem is not None}


def newest_valid(local: PosixTier, remote: Tier, on_progress: OnProgress) -> Restored | None:
    """The newest checkpoint of either tier that verifies, now on the local tier; None if there is none at all.

    Raises CorruptCheckpointError if checkpoints exist but none is valid, TierError if a tier cannot be read: a
    fresh start follows only a successful empty listing.
    """
    here, there = set(names(local)), set(names(remote))
    reasons: list[str] = []
    for name in sorted(here | there, reverse=True):
        try:
            return fetch(name, local, remote, here=name in here, there=name in there, on_progress=on_progress)
        except CorruptCheckpointError as error:
            reasons.append(str(error))
            logger.warning("checkpoint %s is damaged, trying the next older one: %s", name, error)
    if reasons:
        raise CorruptCheckpointError(
            f"{len(here | there)} checkpoints exist in {remote.url} and {local.url}, none is valid:\n  "
            + "\n  ".join(reasons)
            + "\nNothing was deleted. Repair one of them (spot repair), or start over on purpose with resume=False."
        )
    return None


def fetch(
    name: CheckpointName, local: PosixTier, remote: Tier, *, here: bool, there: bool, on_progress: OnProgress
) -> Restored:
    """Bring one checkpoint, verified, to the local tier. Raises CorruptCheckpointError if neither copy is whole."""
    problem: Exception | None = None
    if here:
        try:
            manifest = read_manifest(local, name)
            verify(local, manifest)
            return Restored(manifest, "local")
        except (CorruptCheckpointError, FileNotFoundError, TierError) as error:
            problem = error
            if there:
                logger.warning("local copy of checkpoint %s is damaged, using the remote one: %s", name, error)
    if not there:
        raise CorruptCheckpointError(str(problem or f"checkpoint {name} is on neither tier")) from problem
    try:
        manifest = read_manifest(remote, name)
    except FileNotFoundError as error:
        raise CorruptCheckpointError(f"manifest {name} vanished from {remote.url}") from error
    _download(manifest, local, remote, on_progress, replace=here)
    return Restored(manifest, "remote")


def download_files(
    manifest: Manifest,
    remote: Tier,
    targets: Iterable[Path],
    on_progress: OnProgress,
    *,
    files: Sequence[FileRecord] | None = None,
) -> None:
    """Download and verify `files` of `manifest` (all by default) to `targets`, in the same order."""
    files = manifest.files if files is None else files
    folder, done, total = layout.checkpoint(manifest.name), 0, sum(file.bytes for file in files)

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    for file, path in zip(files, targets, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            remote.download(f"{folder}/{file.path}", path, on_bytes)
        except FileNotFoundError as error:
            raise CorruptCheckpointError(f"{remote.url}/{folder}/{file.path} is missing") from error
        check_record(digest_file(path), file, f"{remote.url}/{folder}")


def _download(manifest: Manifest, local: PosixTier, remote: Tier, on_progress: OnProgress, *, replace: bool) -> None:
    staged = local.stage(manifest.name)
    try:
        download_files(manifest, remote, [staged / file.path for file in manifest.files], on_progress)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    if replace:
        local.set_aside(manifest.name)
    local.commit(staged, manifest)


def is_final(error: Exception) -> bool:
    """Whether retrying `error` is pointless."""
    return not isinstance(error, (TierError, CommitUnknownError)) or isinstance(error, TierDeniedError)
