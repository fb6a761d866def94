"""`spot repair`: mend the damaged checkpoints of a run from its other copy, file by file.

A checkpoint is mended where its other copy verifies whole. Each bad file is first set aside under `damaged/`, then
written whole from the healthy copy and read back; a bad manifest comes last. The manifest stays in between: whoever
resumes meanwhile verifies, and finds the checkpoint damaged as before. So a crash anywhere is mended by running again.
Files that lost their manifest are a checkpoint again if the other copy has it whole. What a newer release committed is
left as it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spot_core.errors import ConfigError, CorruptCheckpointError, NewerFormatError, TierDeniedError, TierError
from spot_core.report import runs
from spot_core.report.places import StoredRun
from spot_core.store import catalog, layout, resume
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import FileRecord, Manifest
from spot_core.store.posix import PosixTier
from spot_core.store.tier import OnBytes, Tier, check_record, digest_file

OnChecked = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class MendedCheckpoint:
    """A damaged checkpoint. files: what was written anew; aside: where the damaged bytes are, None if there were none.

    error: why it is still damaged.
    """

    name: CheckpointName
    files: tuple[str, ...] = ()
    aside: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Repair:
    """What a repair did. sound: how many checkpoints needed nothing."""

    sound: int
    damaged: tuple[MendedCheckpoint, ...]

    @property
    def is_whole(self) -> bool:
        return all(each.error is None for each in self.damaged)

    def as_json(self) -> dict[str, Any]:
        """For machines: what `spot repair --json` prints."""
        damaged = [{**asdict(each), "name": str(each.name)} for each in self.damaged]
        return {"is_whole": self.is_whole, "sound": self.sound, "damaged": damaged}


def repair(target: StoredRun, source: StoredRun, *, now: float, on_progress: OnChecked) -> Repair:
    """Verify every checkpoint of `target` and mend what is damaged from `source`.

    Raises ConfigError (two different runs, one place, a life is active), TierDeniedError, TierError (not listed).
    """
    _check_places(target, source)
    for run in (target, source):
        runs.check_no_active_life(
            run.tier, now=now, undone="written", advice="its agent may delete what is being repaired"
        )
    names = catalog.names(target.tier)
    lost = _without_manifest(target.tier, names) & set(catalog.names(source.tier))
    names = sorted({*names, *lost}, reverse=True)
    manifests = [_manifest(target.tier, name) for name in names]
    total = sum(manifest.total_bytes for manifest in manifests if isinstance(manifest, Manifest))
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    found = [_mend(target.tier, source.tier, name, mine, on_bytes) for name, mine in zip(names, manifests, strict=True)]
    damaged = tuple(each for each in found if each is not None)
    return Repair(sound=len(found) - len(damaged), damaged=damaged)


def _check_places(target: StoredRun, source: StoredRun) -> None:
    here, there = target.tier, source.tier
    is_one_folder = (
        isinstance(here, PosixTier) and isinstance(there, PosixTier) and here.root.resolve() == there.root.resolve()
    )
    if is_one_folder or here.url == there.url:
        raise ConfigError(f"{here.url} cannot be repaired from itself: --from names the run's other copy")
    if target.identity["run_id"] != source.identity["run_id"]:
        raise ConfigError(
            f"{here.url} and {there.url} hold two different runs, whatever their names: nothing was written"
        )


def _without_manifest(tier: Tier, committed: Collection[CheckpointName]) -> set[CheckpointName]:
    found = map(CheckpointName.parse, tier.list(layout.CHECKPOINTS))
    return {name for name in found if name is not None} - set(committed)


def _mend(
    target: Tier, source: Tier, name: CheckpointName, mine: Manifest | NewerFormatError | None, on_bytes: OnBytes
) -> MendedCheckpoint | None:
    """Mend one checkpoint; None if it is sound. mine: its manifest on the target, None if that is damaged or lost."""
    if isinstance(mine, NewerFormatError):
        return MendedCheckpoint(name, error=str(mine))
    try:
        if mine is not None and not resume.damages(target, mine, on_bytes):
            return None
        theirs = _healthy(source, name, mine)
        is_manifest_bad = mine is None or mine.to_json() != theirs.to_json()
        bad = list(resume.damages(target, theirs, lambda _: None))
        aside = _write_anew(target, source, theirs, bad, is_manifest_bad=is_manifest_bad)
    except TierDeniedError:
        raise
    except (CorruptCheckpointError, TierError, FileNotFoundError) as error:
        return MendedCheckpoint(name, error=getattr(error, "strerror", None) or str(error))
    written = tuple(file.path for file in bad)
    return MendedCheckpoint(name, (*written, layout.manifest(name)) if is_manifest_bad else written, aside)


def _healthy(source: Tier, name: CheckpointName, mine: Manifest | None) -> Manifest:
    """The manifest of the other copy, which verifies whole. Raises CorruptCheckpointError saying why there is none."""
    try:
        theirs = catalog.read_manifest(source, name)
    except FileNotFoundError as error:
        raise CorruptCheckpointError(f"{source.url} does not hold it") from error
    if mine is not None and not _is_same_commit(mine, theirs):
        raise CorruptCheckpointError(f"{source.url} holds another checkpoint under this name")
    problems = resume.damaged_files(source, theirs, lambda _: None)
    if problems:
        raise CorruptCheckpointError(f"the other copy is damaged as well: {problems[0]}")
    return theirs


def _is_same_commit(mine: Manifest, theirs: Manifest) -> bool:
    """Whether two manifests differ by damage at most: a digest that lost a bit still reads like a digest."""
    return mine.created == theirs.created and {file.path for file in mine.files} == {file.path for file in theirs.files}


def _write_anew(
    target: Tier, source: Tier, manifest: Manifest, bad: list[FileRecord], *, is_manifest_bad: bool
) -> str | None:
    """Set aside and replace what is bad, the manifest last. Returns the folder of what was set aside, if anything."""
    name = manifest.name
    aside = f"{layout.DAMAGED}/{len(target.list(layout.DAMAGED)):03d}-{name}"
    is_anything_aside = False
    with tempfile.TemporaryDirectory(prefix="spot-repair-") as folder:
        scratch = Path(folder) / "file"  # TMPDIR says where; one file at a time
        for file in bad:
            path = f"{layout.checkpoint(name)}/{file.path}"
            is_anything_aside |= _set_aside(target, path, f"{aside}/{name}/{file.path}", scratch)
            healthy = _at_hand(source, path, scratch)
            check_record(digest_file(healthy), file, source.url)
            target.upload(healthy, path, lambda _: None)
            check_record(target.record(path), file, f"{target.url}/{layout.checkpoint(name)}")
        if is_manifest_bad:
            if _set_aside(target, layout.manifest(name), f"{aside}/{name}.json", scratch):
                is_anything_aside = True
                target.replace(layout.manifest(name), manifest.to_json())
            else:
                target.create(layout.manifest(name), manifest.to_json())
    return f"{target.url}/{aside}" if is_anything_aside else None


def _set_aside(tier: Tier, path: str, aside: str, scratch: Path) -> bool:
    """Copy a file's damaged bytes to where they can be looked at; False if there is no such file."""
    try:
        tier.upload(_at_hand(tier, path, scratch), aside, lambda _: None)
    except FileNotFoundError:
        return False
    return True


def _at_hand(tier: Tier, path: str, scratch: Path) -> Path:
    """A stored file as a local one: itself, or downloaded to `scratch`."""
    if isinstance(tier, PosixTier):
        if not tier.path(path).exists():
            raise FileNotFoundError(f"{tier.path(path)} does not exist")
        return tier.path(path)
    tier.download(path, scratch, lambda _: None)
    return scratch


def _manifest(tier: Tier, name: CheckpointName) -> Manifest | NewerFormatError | None:
    try:
        return catalog.read_manifest(tier, name)
    except NewerFormatError as error:
        return error
    except (CorruptCheckpointError, FileNotFoundError):
        return None
