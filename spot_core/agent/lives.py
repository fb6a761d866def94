"""`lives/`: one record a life, rewritten by its owner with each heartbeat, final when the life has ended.

What the cadence learns from them: `spans_of`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from spot_core.cadence.hazard import End, LifeSpan
from spot_core.errors import CorruptCheckpointError
from spot_core.store import layout
from spot_core.store.layout import CheckpointName
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
# Of these the newest may not have told of a checkpoint yet.
_LAST_LIVES = 8
# A record that says more was not measured.
_LONGEST_S = 366 * 86_400.0

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
    instance, boot_id: which one it ran on. pool: provider, region, zone and type, empty if unknown. began_s: the
    instance's age in seconds when the life began. lived_s: how long it lived, by a clock that nobody sets and that
    stands still while the machine sleeps. cadence: a `CadenceRecord`, None before the first decision.
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
    instance: str = ""
    pool: str = ""
    began_s: float = 0.0
    lived_s: float | None = None
    cadence: dict[str, Any] | None = None

    @property
    def duration_s(self) -> float:
        lived_s = self.heartbeat - self.started if self.lived_s is None else self.lived_s
        return min(_LONGEST_S, max(0.0, lived_s))

    @property
    def is_saved(self) -> bool:
        """Whether the step at which it ended is durable."""
        durable = CheckpointName.parse(self.newest_durable or "")
        return durable is not None and durable.step >= self.step

    def ran_on(self, boot_id: str, instance: str) -> bool:
        """Whether it was this boot of this instance, as far as both are known."""
        is_same_instance = self.instance == instance or "" in {self.instance, instance}
        return bool(boot_id) and self.boot_id == boot_id and is_same_instance

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Life:
        """Raises ValueError, TypeError or KeyError if a field is missing or of another kind."""
        body: dict[str, Any] = json.loads(data)
        life = cls(**{slot: body[slot] for slot in cls.__slots__ if slot in body})
        numbers = (life.incarnation, life.resumed_step, life.step)
        seconds = (life.started, life.heartbeat, life.useful_s, life.began_s)
        texts = (life.host, life.boot_id, life.outcome, life.newest_durable or "", life.instance, life.pool)
        if not (
            all(type(number) is int and number >= 0 for number in numbers)
            and all(_is_finite(value) for value in seconds)
            and (life.lived_s is None or _is_finite(life.lived_s))
            and all(isinstance(text, str) for text in texts)
            and isinstance(life.cadence, dict | None)
        ):
            raise ValueError("a field has the wrong type, or a value that none can have")
        return life


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def spans_of(lives: Sequence[Life], *, boot_id: str, instance: str) -> list[LifeSpan]:
    """What the cadence learns from ended lives, oldest first. boot_id, instance: where the life after them runs."""
    places = [*((life.boot_id, life.instance) for life in lives), (boot_id, instance)]
    return [
        LifeSpan(life.duration_s, end_of(life, *place), began_s=max(0.0, life.began_s))
        for life, place in zip(lives, places[1:], strict=True)
    ]


def end_of(life: Life, next_boot_id: str = "", next_instance: str = "") -> End:
    """How a life ended. Where nobody was left to say so, the next one's place shows whether the instance went too."""
    if life.outcome == PREEMPTED:
        return End.RESCUED if life.is_saved else End.LOST
    if life.outcome == RUNNING:
        return End.CRASHED if life.ran_on(next_boot_id, next_instance) else End.LOST
    return End.CRASHED if life.outcome in {DIED, FAILED} else End.QUIET


def read_lives(tier: Tier, *, most: int = _MOST_LIVES) -> list[Life]:
    """The newest lives of a run, oldest first. A record that cannot be read is skipped with a line in the log."""
    entries = [entry for entry in tier.list(layout.LIVES) if layout.numbered(entry) is not None]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda entry: _read_life(tier, entry), entries[-most:]))
    return [life for life in found if life is not None]


def newest_durable(tier: Tier) -> CheckpointName | None:
    """The newest checkpoint that the last lives of a run say is on the remote, as of their last heartbeats."""
    said = (CheckpointName.parse(life.newest_durable or "") for life in read_lives(tier, most=_LAST_LIVES))
    return max(filter(None, said), default=None)


def _read_life(tier: Tier, entry: str) -> Life | None:
    try:
        return Life.from_json(tier.read(f"{layout.LIVES}/{entry}"))
    except _UNREADABLE as error:
        logger.warning("life record %s/%s is not readable and is left out: %.300r", layout.LIVES, entry, error)
        return None
