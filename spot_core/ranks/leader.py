"""What a session asks of the ranks it trains with: `Alone` where there is one, `Leader` on rank 0 of several.

Rank 0 decides, and what it decides at one boundary all ranks do at the next: it stands on the board by then.
"""

from __future__ import annotations

from dataclasses import replace

from spot_core.emergency import Action
from spot_core.handover import Capture
from spot_core.ranks.team import Team


class Alone:
    """The only rank: what is decided is done at once. delay_steps: from a decision to its deed."""

    delay_steps = 0
    is_alone = True

    def due(self) -> Action:
        """A boundary begins: what was decided before for it."""
        return Action.NONE

    def agree(self, wish: Action) -> Action:
        """What to do at this boundary, of what rank 0 wishes there."""
        return wish

    def signalled_at(self, own: float | None) -> float | None:
        """Monotonic seconds when a signal reached any rank. own: this one."""
        return own

    def completed(self, content: Capture) -> Capture:
        """The checkpoint with what the other ranks add to it."""
        return content

    def close(self) -> None:
        """Let go of the other ranks."""


class Leader(Alone):
    """Rank 0 of several."""

    delay_steps = 1
    is_alone = False

    def __init__(self, team: Team) -> None:
        self._team = team
        self._boundary = 0

    def due(self) -> Action:
        self._boundary += 1
        return self._team.board.announced(self._boundary)

    def agree(self, wish: Action) -> Action:
        if wish in {Action.NONE, Action.TRAIN}:
            return wish
        self._team.board.announce(self._boundary + 1, wish)
        return Action.NONE

    def signalled_at(self, own: float | None) -> float | None:
        if own is not None:
            self._team.board.signalled(0, own)
        return self._team.board.first_signal()

    def completed(self, content: Capture) -> Capture:
        # A run that had ended has no files to add to.
        return replace(content, files=self._team.complete(content.step, content.files))

    def close(self) -> None:
        self._team.close()
