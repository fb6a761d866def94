"""What cadence and notices cost a step: a look in most steps, a whole decision now and then, the record's size.

python benchmarks/decision.py
"""

from __future__ import annotations

import argparse
import json
import random
import timeit

from spot_core.cadence.cadence import Cadence
from spot_core.cadence.hazard import End, Evidence, LifeSpan
from spot_core.cadence.interval import Costs
from spot_core.cadence.record import CadenceRecord
from spot_core.emergency import EmergencyPath
from spot_core.handover import Capture
from spot_core.notice.signals import SignalWatcher
from spot_core.stand_in import StandIn

_LOOKS, _REPEATS = 20_000, 5


def per_step_us(lives: int) -> tuple[float, float, int]:
    """Microseconds of a look in most steps and of a whole decision, bytes of the record, after so many lives."""
    draw = random.Random(1)
    spans = [LifeSpan(draw.expovariate(1.0) * 3600.0, End.LOST) for _ in range(lives)]
    cadence = Cadence(evidence=Evidence.of(spans), costs=Costs(0.02, 20.0, 1.0, 1.1), last_useful_s=0.0)
    ages_s = iter(range(3600 * 100, 10**9))

    def look() -> None:
        cadence.is_due(0.0, age_s=next(ages_s) / 100)

    looks_s = min(timeit.repeat(look, number=_LOOKS, repeat=_REPEATS))
    whole_s = min(timeit.repeat(lambda: cadence.decision(age_s=4000.0), number=_LOOKS // 10, repeat=_REPEATS))
    size = len(json.dumps(CadenceRecord(cadence, 4000.0, 10.0, 0.0).to_json()))
    return 1e6 * looks_s / _LOOKS, 1e7 * whole_s / _LOOKS, size


def watching_us() -> float:
    """Microseconds that a step spends on notices while none has come: rest, move, and the look at the boundary."""
    path, signals = EmergencyPath(25.0), SignalWatcher()
    stand_in = StandIn(lambda _: None, signals, may_exit=False)

    def step() -> None:
        stand_in.rests(lambda: _unused())
        stand_in.moves()
        with stand_in:
            path.at_boundary(None, signals.noticed_at, costs=lambda: (1.0, 1.0), is_durable=lambda _: False)

    return 1e6 * min(timeit.repeat(step, number=_LOOKS, repeat=_REPEATS)) / _LOOKS


def _unused() -> Capture:
    raise AssertionError("nothing was announced")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{'lives':>6} {'a step, µs':>11} {'a decision, µs':>15} {'record, bytes':>14}")
    for lives in (0, 10, 1_000, 100_000):
        step_us, whole_us, size = per_step_us(lives)
        print(f"{lives:6} {step_us:11.2f} {whole_us:15.1f} {size:14}")
    print(f"\nwatching for notices: {watching_us():.2f} µs a step")


if __name__ == "__main__":
    main()
