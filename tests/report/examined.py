"""What `spot doctor --json` said, and what its probe of a remote found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from spot_core.report.checks.finding import Finding
from spot_core.report.checks.remote import RemoteProbe
from tests.report.conftest import Result

# Of a checkpoint that is written quickly.
SMALL_MB = 0.05

Examine = Callable[..., Result]


def found(result: Result) -> dict[tuple[str, str], dict[str, Any]]:
    """The findings, by area and what was looked at."""
    return {(each["area"], each["what"]): each for each in result.json["findings"]}


def statuses(result: Result, area: str) -> dict[str, str]:
    return {what: each["status"] for (of, what), each in found(result).items() if of == area}


def names_in(folder: Path) -> set[str]:
    """Everything below, folders too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def probed(probe: RemoteProbe, sample: Path | None = None) -> dict[str, Finding]:
    """What a probe finds, by what was tried."""
    probe.reach()
    probe.run(sample)
    return {each.what: each for each in probe.findings}
