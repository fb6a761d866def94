"""What a notice is, and what gives one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Notice:
    """This instance is about to be taken away.

    source: who says so. deadline_unix_s: when it goes. is_dated: whether the provider named that time; else it is what
    is usual. noticed_unix_s: when it was seen here.
    """

    source: str
    deadline_unix_s: float
    noticed_unix_s: float
    is_dated: bool = True


class Watcher(Protocol):
    """One place where notices appear.

    source: its name. every_s: seconds from one look to the next.
    """

    source: str
    every_s: float

    def look(self) -> Notice | None:
        """What stands now; None if nothing does, or if it was withdrawn. Takes a few seconds at most, unless the
        service is made to answer upon a change.

        Raises OSError, ValueError, TypeError, KeyError or RecursionError if that cannot be told.
        """
