"""What adapters and the session hand each other: a capture one way, a resume point and the end the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spot_core.snapshot.files import NativeFile
from spot_core.store.manifest import Manifest


class Preempted(SystemExit):
    """Ends the process of a preempted run with the configured exit code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """What an adapter hands over at a boundary. native: the part of `files` that stock tools load.

    max_steps: steps this training is to last, if known. notes: why a resume from here is not bit-exact.
    pinned_step: step of an earlier checkpoint that must be kept with this one (the best model), if any.
    """

    step: int
    epoch: float
    native: str
    files: list[NativeFile]
    max_steps: int | None = None
    notes: tuple[str, ...] = ()
    pinned_step: int | None = None


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A verified checkpoint. folder: its files on the local tier; pinned: folder of the checkpoint it refers to."""

    manifest: Manifest
    folder: Path
    source: str
    pinned: Path | None

    def verdict(self, number: int, versions: Mapping[str, str], notes: tuple[str, ...]) -> str:
        """The line that a resume logs: where it continues, and whether bit-exactly or why not.

        number: the incarnation that resumes. versions: of the libraries now. notes: the adapter's reasons.
        """
        then = self.manifest.versions
        changed = [f"{key} {then[key]} -> {versions[key]}" for key in then if versions.get(key, then[key]) != then[key]]
        reasons = [*self.manifest.notes, *notes, *changed]
        return (
            f"resume: step {self.manifest.step} from the {self.source} tier, checkpoint {self.manifest.name}, as "
            f"incarnation {number}; {'not bit-exact: ' + '; '.join(reasons) if reasons else 'bit-exact'}"
        )
