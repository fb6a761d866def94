"""What `spot doctor --json` said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
