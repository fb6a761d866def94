"""Names inside a run's folder, the same on every tier (design.md section 3).

run.json                                 the run's identity             create-only
incarnations/000003.json                 claim of a life                create-only
lives/000003.json                        heartbeat and outcome          rewritten by its owner
checkpoints/000003-000000001200/…        native files                   immutable
manifests/000003-000000001200.json       the commit record              create-only, written last
manifests/000003-000000001200.complete.json   training ended there      create-only
damaged/000-000003-000000001200/…        what a repair set aside         a resume does so on the local tier
staging/, journal/                       local tier only
"""

from __future__ import annotations

import re
from typing import NamedTuple

RUN = "run.json"
INCARNATIONS = "incarnations"
LIVES = "lives"
CHECKPOINTS = "checkpoints"
MANIFESTS = "manifests"
STAGING = "staging"
JOURNAL = "journal"
DAMAGED = "damaged"

_COMPLETE = ".complete.json"
_NAME = re.compile(r"([0-9]{6})-([0-9]{12})")
LAST_INCARNATION = 999_999


class CheckpointName(NamedTuple):
    """Orders as resume does: highest incarnation first, then highest step."""

    incarnation: int
    step: int

    def __str__(self) -> str:
        return f"{self.incarnation:06d}-{self.step:012d}"

    @classmethod
    def parse(cls, text: str) -> CheckpointName | None:
        """The name in `text`, or None if it is something else."""
        match = _NAME.fullmatch(text)
        return cls(int(match[1]), int(match[2])) if match else None


def checkpoint(name: CheckpointName) -> str:
    return f"{CHECKPOINTS}/{name}"


def manifest(name: CheckpointName) -> str:
    return f"{MANIFESTS}/{name}.json"


def completion(name: CheckpointName) -> str:
    return f"{MANIFESTS}/{name}{_COMPLETE}"


def committed(entry: str) -> CheckpointName | None:
    """The checkpoint whose manifest an entry of `manifests/` is, or None."""
    return CheckpointName.parse(entry.removesuffix(".json")) if entry.endswith(".json") else None


def completed(entry: str) -> CheckpointName | None:
    """The checkpoint that an entry of `manifests/` marks as the end of training, or None."""
    return CheckpointName.parse(entry.removesuffix(_COMPLETE)) if entry.endswith(_COMPLETE) else None


def incarnation(number: int) -> str:
    return f"{INCARNATIONS}/{number:06d}.json"


def life(number: int) -> str:
    return f"{LIVES}/{number:06d}.json"


def numbered(entry: str) -> int | None:
    """The number of `000003.json`, or None if `entry` is something else."""
    stem, dot, suffix = entry.partition(".")
    return int(stem) if dot and suffix == "json" and re.fullmatch("[0-9]{6}", stem) else None
