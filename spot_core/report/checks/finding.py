"""What a check found, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

OK, WARNING, PROBLEM, SKIPPED = "ok", "warning", "problem", "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    status: one of the words above; skipped is what cannot be told from here. fix: what to do, empty if nothing is.
    measured: numbers, with their units in the names.
    """

    area: str
    what: str
    status: str
    detail: str
    fix: str = ""
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Area:
    """Makes the findings of one area."""

    name: str

    def ok(self, what: str, detail: str, **measured: float) -> Finding:
        return Finding(area=self.name, what=what, status=OK, detail=detail, measured=measured)

    def warning(self, what: str, detail: str, fix: str, **measured: float) -> Finding:
        return Finding(area=self.name, what=what, status=WARNING, detail=detail, fix=fix, measured=measured)

    def problem(self, what: str, detail: str, fix: str, **measured: float) -> Finding:
        return Finding(area=self.name, what=what, status=PROBLEM, detail=detail, fix=fix, measured=measured)

    def skipped(self, what: str, detail: str, fix: str = "") -> Finding:
        return Finding(area=self.name, what=what, status=SKIPPED, detail=detail, fix=fix)
