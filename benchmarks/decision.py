"""What a step costs in which nothing is due: the cadence's look, notices, the whole session, another rank,
a batch's random state.

python benchmarks/decision.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import tempfile
import timeit
from pathlib import Path

import torch

from spot_core.cadence.cadence import Cadence
from spot_core.cadence.hazard import End, Evidence, LifeSpan
from spot_core.cadence.interval import Costs
from spot_core.cadence.record import CadenceRecord
from spot_core.config import SpotConfig
from spot_core.emergency import EmergencyPath
from spot_core.handover import Capture
from spot_core.notice.signals import SignalWatcher
from spot_core.opening import open_session
from spot_core.ranks.follower import Follower
from spot_core.ranks.team import Opened, Team, furnish
from spot_core.snapshot import rng
from spot_core.snapshot.files import TorchFile
from spot_core.stand_in import StandIn
from spot_core.store.identity import RunIdentity

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


def session_us() -> float:
    """Microseconds of all that a real session does in such a step, its agent at work beside it."""
    with tempfile.TemporaryDirectory(prefix="decision-") as folder:
        config = SpotConfig(remote=f"{folder}/remote/run", local=f"{folder}/local", interval_s=1e6)
        session = open_session(config, RunIdentity("benchmark", {}), device=torch.device("cpu"))
        session.begin()
        steps = itertools.count(1)

        def step() -> None:
            session.step_started()
            session.before_optimizer_step()
            session.step_completed(next(steps))
            session.at_boundary(_unused)
            session.rests(_unused)
            session.moves()

        try:
            return 1e6 * min(timeit.repeat(step, number=_LOOKS, repeat=_REPEATS)) / _LOOKS
        finally:
            session.close()


def following_us() -> tuple[float, float]:
    """Microseconds of a step of a rank other than 0, and of handing over its part, 20 kB as under the Trainer."""
    with tempfile.TemporaryDirectory(prefix="decision-") as folder:
        place = Path(folder)
        furnish(place, 2)
        config = SpotConfig(remote=f"{folder}/remote/run", local=f"{folder}/local")
        follower = Follower(config, Team(1, 2, place), Opened(None, is_claimed=True, max_steps=None))
        part = TorchFile(path="state.pt", tree=rng.to_portable(rng.capture()), is_part=True)

        def step() -> None:
            follower.step_started()
            follower.before_optimizer_step()
            follower.step_completed(1)
            follower.at_boundary(_unused)

        def hand_over() -> None:
            follower.finish(lambda: Capture(step=1, epoch=0.0, native="", files=[part]))

        step_s = min(timeit.repeat(step, number=_LOOKS, repeat=_REPEATS)) / _LOOKS
        return 1e6 * step_s, 1e6 * min(timeit.repeat(hand_over, number=100, repeat=_REPEATS)) / 100


def random_state_us() -> float:
    """Microseconds of reading all generators before a batch."""
    looks_s = min(timeit.repeat(lambda: rng.capture(with_devices=False), number=_LOOKS, repeat=_REPEATS))
    return 1e6 * looks_s / _LOOKS


def _unused() -> Capture:
    raise AssertionError("nothing was due")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{'lives':>6} {'a step, µs':>11} {'a decision, µs':>15} {'record, bytes':>14}")
    for lives in (0, 10, 1_000, 100_000):
        step_us, whole_us, size = per_step_us(lives)
        print(f"{lives:6} {step_us:11.2f} {whole_us:15.1f} {size:14}")
    logging.getLogger("spot_core").setLevel(logging.WARNING)
    print(f"\nwatching for notices: {watching_us():.2f} µs a step")
    print(f"a session's step: {session_us():.2f} µs, with the watching and the look")
    step_us, part_us = following_us()
    print(f"a step of another rank: {step_us:.2f} µs; handing over its part of a checkpoint: {part_us:.0f} µs")
    print(f"random state before a batch: {random_state_us():.2f} µs")


if __name__ == "__main__":
    main()
