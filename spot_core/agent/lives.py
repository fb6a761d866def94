"""`lives/`: one record a life, rewritten by its owner with each heartbeat, final when the life has ended."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from spot_core.store import layout
from spot_core.store.tier import Tier

logger = logging.getLogger(__name__)

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
        body: dict[str, Any] = json.loads(data)
        return cls(**{slot: body[slot] for slot in cls.__slots__ if slot in body})


def read_lives(tier: Tier, *, most: int = _MOST_LIVES) -> list[Life]:
    """The newest lives of a run, oldest first. A record that cannot be read is skipped with a line in the log."""
    entries = [entry for entry in tier.list(layout.LIVES) if layout.numbered(entry) is not None]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda entry: _read_life(tier, entry), entries[-most:]))
    return [life for life in found if life is not None]


def _read_life(tier: Tier, entry: str) -> Life | None:
    try:
        return Life.from_json(tier.read(f"{layout.LIVES}/{entry}"))
    except (ValueError, TypeError, KeyError, FileNotFoundError) as error:
        logger.warning("life record %s/%s is not readable and is left out: %r", layout.LIVES, entry, error)
        return None
