"""`lives/`: one record a life, rewritten by its owner with each heartbeat, final when the life has ended."""

from __future__ import annotations

import json
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from spot_core.errors import CorruptCheckpointError
from spot_core.store import layout
from spot_core.store.tier import Tier

logger = logging.getLogger(__name__)

_UNREADABLE = (
    ValueError,
    TypeError,
    KeyError,
    OverflowError,
    RecursionError,
    FileNotFoundError,
    CorruptCheckpointError,
)
# Lives read at start; older ones have been forgotten by the estimator anyway.
_MOST_LIVES = 200

RUNNING = "running"
COMPLETED = "completed"  # training is complete
PREEMPTED = "preempted"  # stopped on a notice, on purpose
STOPPED = "stopped"  # interrupted by the user
FAILED = "failed"  # an exception ended it
DIED = "died"  # the process vanished while the instance lived on
FENCED = "fenced"  # a newer life took over


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """One life of the job. Times are Unix seconds; useful_s counts over all lives that led here.

    outcome: one of this module's words; `running` with an old heartbeat means that the whole instance was lost.
    """

    incarnation: int
    host: str
    boot_id: str
    started: float
    heartbeat: float
    outcome: str = RUNNING
    resumed_step: int = 0
    step: int = 0
    useful_s: float = 0.0
    newest_durable: str | None = None

    @property
    def duration_s(self) -> float:
        return max(0.0, self.heartbeat - self.started)

    @property
    def is_interrupted(self) -> bool:
        """Whether this life, no longer alive, was ended from outside: a preemption or a crash."""
        return self.outcome in {RUNNING, PREEMPTED, DIED}

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Life:
        """Raises ValueError, TypeError or KeyError if a field is missing or of another kind."""
        body: dict[str, Any] = json.loads(data)
        life = cls(**{slot: body[slot] for slot in cls.__slots__ if slot in body})
        numbers = (life.incarnation, life.resumed_step, life.step)
        seconds = (life.started, life.heartbeat, life.useful_s)
        texts = (life.host, life.boot_id, life.outcome, life.newest_durable or "")
        if not (
            all(type(number) is int and number >= 0 for number in numbers)
            and all(isinstance(value, (int, float)) and math.isfinite(value) for value in seconds)
            and all(isinstance(text, str) for text in texts)
        ):
            raise ValueError("a field has the wrong type, or a value that none can have")
        return life


def read_lives(tier: Tier, *, most: int = _MOST_LIVES) -> list[Life]:
    """The newest lives of a run, oldest first. A record that cannot be read is skipped with a line in the log."""
    entries = [entry for entry in tier.list(layout.LIVES) if layout.numbered(entry) is not None]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda entry: _read_life(tier, entry), entries[-most:]))
    return [life for life in found if life is not None]


def _read_life(tier: Tier, entry: str) -> Life | None:
    try:
        return Life.from_json(tier.read(f"{layout.LIVES}/{entry}"))
    except _UNREADABLE as error:
        logger.warning("life record %s/%s is not readable and is left out: %.300r", layout.LIVES, entry, error)
        return None
