"""The board: a page of memory that all ranks of one machine see. Reading it costs a step nothing.

Rank 0 writes what all ranks do at a boundary, one boundary ahead; each rank writes when a signal reached it. No lock is
needed: no rank comes to the end of a step before all have begun its backward pass, where gradients are exchanged, so
what rank 0 wrote at the boundary before is there.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

from spot_core.emergency import Action

_ANNOUNCED = struct.Struct("=q")
_SIGNALLED = struct.Struct("=d")
# In the order of their numbers on the board; 0 is nothing.
_ACTIONS = (Action.NONE, Action.SAVE, Action.COPY, Action.LEAVE, Action.HOLD)
_KINDS = len(_ACTIONS)


class Board:
    """One rank's view of it. Boundaries are numbered from 1, on each rank alike."""

    def __init__(self, path: Path, size: int) -> None:
        self._size = size
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._page = mmap.mmap(file, _bytes(size))
        finally:
            os.close(file)

    @staticmethod
    def create(path: Path, size: int) -> None:
        """An empty one for `size` ranks. Raises OSError."""
        path.write_bytes(bytes(_bytes(size)))  # written, not sparse: a page without memory behind it would kill

    def announce(self, boundary: int, action: Action) -> None:
        """Rank 0: what all ranks do there. In one aligned word, which is never seen half written."""
        _ANNOUNCED.pack_into(self._page, 0, boundary * _KINDS + _ACTIONS.index(action))

    def announced(self, boundary: int) -> Action:
        """What all ranks do at this boundary."""
        number, action = divmod(_ANNOUNCED.unpack_from(self._page, 0)[0], _KINDS)
        return _ACTIONS[action] if number == boundary else Action.NONE

    def signalled(self, rank: int, at: float) -> None:
        """A signal reached that rank. at: monotonic seconds, which all processes of a machine count alike."""
        _SIGNALLED.pack_into(self._page, self._offset(rank), at)

    def first_signal(self) -> float | None:
        """When the first signal reached any rank, None if none has."""
        times = (_SIGNALLED.unpack_from(self._page, self._offset(rank))[0] for rank in range(self._size))
        return min((at for at in times if at), default=None)

    def close(self) -> None:
        self._page.close()

    @staticmethod
    def _offset(rank: int) -> int:
        return _ANNOUNCED.size + rank * _SIGNALLED.size


def _bytes(size: int) -> int:
    return _ANNOUNCED.size + size * _SIGNALLED.size
