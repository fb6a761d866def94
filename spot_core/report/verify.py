"""`spot verify`: reads every stored byte back and compares it with the manifests. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from spot_core.errors import CorruptCheckpointError, NewerFormatError, TierDeniedError, TierError
from spot_core.report.places import StoredRun
from spot_core.store import catalog, layout, resume
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.resume import OnProgress
from spot_core.store.tier import OnBytes, Tier

OK = "ok"
DAMAGED = "damaged"
UNREADABLE = "unreadable"  # the tier did not answer: nothing is known
NEWER = "newer format"  # a newer release committed it: this one cannot tell


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedCheckpoint:
    """What was found at one checkpoint. problems: one sentence for each missing or different file."""

    name: str
    step: int
    result: str
    files: int = 0
    size_bytes: int = 0
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedRun:
    """A verified run. orphans: folders of files that no manifest commits; strangers: names nobody here writes.

    error: why the run as a whole could not be verified.
    """

    run: str
    url: str
    checkpoints: tuple[VerifiedCheckpoint, ...] = ()
    orphans: tuple[str, ...] = ()
    strangers: tuple[str, ...] = ()
    error: str | None = None

    @property
    def is_sound(self) -> bool:
        return self.error is None and all(checkpoint.result == OK for checkpoint in self.checkpoints)


def verify_run(run: StoredRun, on_progress: OnProgress) -> VerifiedRun:
    """Verify every checkpoint of a run, newest first. Raises TierError if it cannot even be listed."""
    tier = run.tier
    if run.error is not None:
        return VerifiedRun(run=run.name, url=tier.url, error=run.error)
    plan = [(name, _manifest(tier, name)) for name in catalog.names(tier)]
    total = sum(manifest.total_bytes for _, manifest in plan if isinstance(manifest, Manifest))
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    found = []
    for _, manifest in plan:
        if isinstance(manifest, Manifest):
            verified = _verify(tier, manifest, on_bytes)
        elif manifest is None:
            continue
        else:
            verified = manifest
        if verified is not None:
            found.append(verified)
    orphans, strangers = _uncommitted(tier)
    return VerifiedRun(
        run=run.name, url=tier.url, checkpoints=tuple(found), orphans=tuple(orphans), strangers=tuple(strangers)
    )


def _manifest(tier: Tier, name: CheckpointName) -> Manifest | VerifiedCheckpoint | None:
    """The manifest, what is wrong with it, or None if it was pruned since it was listed."""
    try:
        return catalog.read_manifest(tier, name)
    except FileNotFoundError:
        return None
    except CorruptCheckpointError as error:
        return VerifiedCheckpoint(
            name=str(name),
            step=name.step,
            result=NEWER if isinstance(error, NewerFormatError) else DAMAGED,
            problems=(f"{tier.url}/{layout.manifest(name)}: {error}",),
        )


def _verify(tier: Tier, manifest: Manifest, on_bytes: OnBytes) -> VerifiedCheckpoint | None:
    """What was found, or None if the checkpoint was pruned meanwhile: a run may be training while it is verified."""
    try:
        problems, result = resume.damaged_files(tier, manifest, on_bytes), OK
        if problems:
            result = DAMAGED
            if _manifest(tier, manifest.name) is None:
                return None
    except TierDeniedError:
        raise
    except TierError as error:
        problems, result = [error.strerror or str(error)], UNREADABLE
    return VerifiedCheckpoint(
        name=str(manifest.name),
        step=manifest.step,
        result=result,
        files=len(manifest.files),
        size_bytes=manifest.total_bytes,
        problems=tuple(problems),
    )


def _uncommitted(tier: Tier) -> tuple[list[str], list[str]]:
    # Folders first: what is committed between the two listings is then not taken for an orphan.
    folders = tier.list(layout.CHECKPOINTS)
    entries = tier.list(layout.MANIFESTS)
    committed = set(map(layout.committed, entries)) - {None}
    orphans = [f"{layout.CHECKPOINTS}/{name}" for name in folders if CheckpointName.parse(name) not in committed]
    strangers = [
        f"{layout.MANIFESTS}/{entry}"
        for entry in entries
        if layout.committed(entry) is None and layout.completed(entry) is None
    ]
    return orphans, strangers
