"""What adapters and the session hand each other: a capture one way, a resume point and the end the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from spot_core.errors import ConfigError
from spot_core.snapshot.files import NativeFile
from spot_core.store import catalog, layout
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.posix import PosixTier


def assured() -> bool:
    """Of a capture in which nothing is assumed."""
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """What an adapter hands over at a boundary. native: the part of `files` that stock tools load.

    max_steps: steps this training is to last, if known. notes: why a resume from here is not bit-exact.
    pinned_step: step of an earlier checkpoint that must be kept with this one (the best model), if any. loggers: ids
    of tracker runs, by tracker, that only the adapter knows.
    is_current: whether `files` name what they should, where the adapter assumed what takes long to look up. Asked once,
    by any thread, before an optimizer steps again; where it says no, the next capture assumes nothing.
    """

    step: int
    epoch: float
    native: str
    files: list[NativeFile]
    max_steps: int | None = None
    notes: tuple[str, ...] = ()
    pinned_step: int | None = None
    loggers: Mapping[str, str] = field(default_factory=dict)
    is_current: Callable[[], bool] = assured


def certain(capture: Callable[[], Capture]) -> Capture:
    """A capture that is known to be current, for a checkpoint that has to be written."""
    content = capture()
    return replace(content if content.is_current() else capture(), is_current=assured)


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A verified checkpoint. folder: its files on the local tier; pinned: folder of the checkpoint it refers to."""

    manifest: Manifest
    folder: Path
    source: str
    pinned: Path | None

    @classmethod
    def read(
        cls, tiers: Sequence[PosixTier], name: CheckpointName, pin: CheckpointName | None, *, source: str
    ) -> ResumePoint:
        """The checkpoint `name` on the first of `tiers`, all of them local, that holds it; pin: the one it refers to.

        source: the tier it was found on.
        """

        def holder(wanted: CheckpointName) -> PosixTier:
            return next((tier for tier in tiers if tier.path(layout.manifest(wanted)).exists()), tiers[0])

        folder = holder(name).path(layout.checkpoint(name))
        pinned = holder(pin).path(layout.checkpoint(pin)) if pin is not None else None
        return cls(catalog.read_manifest(holder(name), name), folder, source, pinned)

    @property
    def committed(self) -> dict[int, CheckpointName]:
        """This checkpoint and the one it refers to, by step."""
        found = {self.manifest.step: self.manifest.name}
        if self.manifest.pins is not None and self.pinned is not None:
            found[self.manifest.pins.step] = self.manifest.pins
        return found

    def check_base(self, fingerprint: str | None) -> None:
        """Raise ConfigError if this checkpoint was trained on another frozen base than the one of that fingerprint.

        run.json is compared before anything is restored, but nothing vouches for it: the manifest may be signed. One
        without a fingerprint has nothing to compare.
        """
        then = self.manifest.base_fingerprint
        if then is not None and then != fingerprint:
            raise ConfigError(
                f"checkpoint {self.manifest.name} was trained on another frozen base: fingerprint {then} there, "
                f"{fingerprint or 'no frozen base'} now. Training was not started and no checkpoint was written or "
                "deleted. Build the model from the base of the run's earlier lives, or give this run its own name: "
                "another last component of `remote` (SPOT_REMOTE)."
            )

    def verdict(self, number: int, versions: Mapping[str, str], notes: tuple[str, ...]) -> str:
        """The line that a resume logs: where it continues, and whether bit-exactly or why not.

        number: the incarnation that resumes. versions: of the libraries now. notes: the adapter's reasons.
        """
        then = self.manifest.versions
        changed = [f"{key} {then[key]} -> {versions[key]}" for key in then if versions.get(key, then[key]) != then[key]]
        reasons = list(dict.fromkeys([*self.manifest.notes, *notes, *changed]))
        return (
            f"resume: step {self.manifest.step} from the {self.source} tier, checkpoint {self.manifest.name}, as "
            f"incarnation {number}; {'not bit-exact: ' + '; '.join(reasons) if reasons else 'bit-exact'}"
        )


def refuse(unsupported: Mapping[str, bool]) -> None:
    """Raise ConfigError for the first thing that is used and could not be resumed exactly. Keys end the sentence."""
    for what, is_used in unsupported.items():
        if is_used:
            raise ConfigError(
                f"SpotCallback does not work with {what} yet, and refuses to start rather than fail to resume. "
                "Nothing was written. Change that setting, or train without the callback."
            )


def expected_bytes(stored_bytes: int, trained_bytes: int) -> int:
    """Size of a checkpoint before the optimizer has a state: Adam keeps two values beside each trained one."""
    return stored_bytes + 2 * trained_bytes
