"""Choosing what to resume from: the newest valid checkpoint, from the nearest tier that has it whole.

No byte is used that was not verified. A damaged copy is reported by name and the other tier, then the next older
checkpoint is tried; so is one that is not signed, where the tiers have the run's keys. The chosen checkpoint ends up
committed on the local tier.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from spot_core.errors import CommitUnknownError, CorruptCheckpointError, NewerFormatError, TierDeniedError, TierError
from spot_core.store import catalog, layout
from spot_core.store.catalog import Recent
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import FileRecord, Manifest
from spot_core.store.posix import PosixTier
from spot_core.store.tier import OnBytes, Tier, check_record, check_size

logger = logging.getLogger(__name__)

# Before each one but the first all that the one before showed was tried in vain.
_MOST_LISTINGS = 5

OnProgress = Callable[[int, int], None]
# Where a checkpoint that is to be downloaded has room: the local tier or the overflow. Raises ConfigError.
FindRoom = Callable[[Manifest], PosixTier]


@dataclass(frozen=True, slots=True)
class Restored:
    """A verified checkpoint on the local tier or in the overflow; source: `local`, `overflow`, or `remote` for both."""

    manifest: Manifest
    source: str


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


def newest_valid(
    local: PosixTier,
    remote: Tier,
    on_progress: OnProgress,
    *,
    overflow: PosixTier | None = None,
    find_room: FindRoom | None = None,
    recent: Recent | None = None,
) -> Restored | None:
    """The newest checkpoint of any tier that verifies, now on the local tier; None if there is none at all.

    overflow: what a full disk left in memory; a checkpoint may stay there. find_room: the local tier by default.
    recent: what the remote was just seen to hold; it is listed if that is not given, or nothing of it is valid.
    The agent of the life before may still commit and prune: what it superseded after it was listed is no damage.
    Raises CorruptCheckpointError if checkpoints exist but none is valid, TierError if a tier cannot be read: a
    fresh start follows only a successful empty listing.
    """
    tried: set[CheckpointName] = set()
    reasons: list[str] = []
    for _ in range(_MOST_LISTINGS):
        recent, listed = None, recent or Recent(catalog.names(remote))
        here, there = set(catalog.names(local)), set(listed.names)
        over = set(catalog.names(overflow)) if overflow is not None else set()
        # Of older ones it is not known here what the remote holds between them.
        untried = {name for name in (here | there | over) - tried if listed.since is None or name >= listed.since}
        if not untried and listed.since is None:
            break
        tried |= untried
        for name in sorted(untried, reverse=True):
            try:
                return fetch(
                    name,
                    local,
                    remote,
                    here=name in here,
                    there=name in there,
                    manifest=listed.manifest if listed.names[:1] == [name] else None,
                    overflow=overflow if name in over else None,
                    find_room=find_room,
                    on_progress=on_progress,
                )
            except CorruptCheckpointError as error:
                reasons.append(str(error))
                what = "of a newer format" if isinstance(error, NewerFormatError) else "damaged"
                logger.warning("checkpoint %s is %s, trying the next older one: %s", name, what, error)
    if reasons:
        raise CorruptCheckpointError(
            f"{len(tried)} checkpoints exist in {remote.url} and {local.url}, none is valid:\n  "
            + "\n  ".join(reasons)
            + "\nNothing was deleted. Repair one of them (spot repair), or start over on purpose with resume=False."
        )
    return None


def fetch(
    name: CheckpointName,
    local: PosixTier,
    remote: Tier,
    *,
    here: bool,
    there: bool,
    on_progress: OnProgress,
    manifest: Manifest | None = None,
    overflow: PosixTier | None = None,
    find_room: FindRoom | None = None,
) -> Restored:
    """Bring one checkpoint, verified, to the local tier. Raises CorruptCheckpointError if no copy is whole.

    manifest: the remote's, where it is known. overflow: given if it holds one. find_room: asked before anything is
    downloaded.
    """
    problem: Exception | None = None
    for tier, source in ((local if here else None, "local"), (overflow, "overflow")):
        try:
            if tier is not None:
                found = catalog.read_manifest(tier, name)
                verify(tier, found)
                _clear_of_strangers(tier, found)
                if problem is not None:
                    local.set_aside(name)  # what both processes look for first must not be the damaged copy
                return Restored(found, source)
        except (CorruptCheckpointError, FileNotFoundError, TierError) as error:
            problem = error
            if there:
                logger.warning("%s copy of checkpoint %s is damaged, using the remote one: %s", source, name, error)
    if not there:
        if isinstance(problem, NewerFormatError):
            raise problem
        raise CorruptCheckpointError(str(problem or f"checkpoint {name} is on neither tier")) from problem
    try:
        manifest = manifest or catalog.read_manifest(remote, name)
    except FileNotFoundError as error:
        raise CorruptCheckpointError(f"manifest {name} vanished from {remote.url}") from error
    check_sizes(remote, manifest)  # before room is made for what may be damage
    target = local if find_room is None else find_room(manifest)
    _download(manifest, target, remote, on_progress)
    if target is not local and name in catalog.names(local):
        local.set_aside(name)
    elif overflow is not None and target is not overflow:
        overflow.delete([layout.manifest(name), layout.checkpoint(name)])  # memory is no place for what is damaged
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

    def copy(file: FileRecord, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = remote.download(f"{folder}/{file.path}", path, on_bytes, size=file.bytes)
        except FileNotFoundError as error:
            raise CorruptCheckpointError(f"{remote.url}/{folder}/{file.path} is missing") from error
        check_record(found, file, f"{remote.url}/{folder}")

    # One is written to the disk while the next one travels.
    with ThreadPoolExecutor(4) as pool:
        copies = [pool.submit(copy, file, path) for file, path in zip(files, targets, strict=True)]
        try:
            for each in copies:
                each.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def check_sizes(tier: Tier, manifest: Manifest) -> None:
    """Raise CorruptCheckpointError if a file is missing or has another size: found before anything is downloaded."""
    folder = layout.checkpoint(manifest.name)

    def check(file: FileRecord) -> None:
        try:
            check_size(tier.size(f"{folder}/{file.path}"), file, f"{tier.url}/{folder}")
        except FileNotFoundError as error:
            raise CorruptCheckpointError(f"{tier.url}/{folder}/{file.path} is missing") from error

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, manifest.files))


def _clear_of_strangers(tier: PosixTier, manifest: Manifest) -> None:
    strangers = tier.set_strangers_aside(manifest)
    if strangers:
        logger.warning(
            "checkpoint %s held %d files that its manifest does not name (%s): they were moved to %s/%s and are not "
            "loaded. Nothing of this project writes there",
            manifest.name,
            len(strangers),
            ", ".join(map(repr, strangers[:5])),
            tier.url,
            layout.DAMAGED,
        )


def _download(manifest: Manifest, target: PosixTier, remote: Tier, on_progress: OnProgress) -> None:
    staged = target.stage(manifest.name)
    try:
        download_files(manifest, remote, [staged / file.path for file in manifest.files], on_progress)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    if manifest.name in catalog.names(target):
        target.set_aside(manifest.name)
    target.commit(staged, manifest)


def is_final(error: Exception) -> bool:
    """Whether retrying `error` is pointless."""
    return not isinstance(error, (TierError, CommitUnknownError)) or isinstance(error, TierDeniedError)
