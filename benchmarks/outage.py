"""What a bad network does to the speed of training: one training, good and bad network in turn.

    python benchmarks/outage.py [--seconds 10] [--repeat 3] [--step fixed|cpu|both] [--json FILE]

A training drains to a real S3 server through a proxy that spoils requests. A turn is some seconds of good network, then
as long with one fault; before the next turn everything is drained. Reported is the step rate under the fault over that
of the good seconds before it: the median of the turns, the lowest and the highest. Server, proxy and agent run on the
same cores as the training. `none` is a fault that does nothing: how much two equal halves differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import command_line
import psutil
from outage_training import STAMP

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the server and the proxy of the tests

from tests.faultproxy import HANG, LOST_REPLY, SLOW_DOWN, UNREACHABLE, Fault, FaultProxy, Request  # noqa: E402
from tests.servers import S3Server  # noqa: E402

STEP_S = 0.02
_DRAINED_S = 120.0
_UPLINK, _UPLINK_BYTES_S = "50 KB/s uplink", 50e3


@dataclass(frozen=True, slots=True)
class Row:
    """One fault. ratio: step rate under it over that before it, median, lowest and highest. held: of the time, how
    much the training thread spent in the session; agent: processor seconds of the agent a second; each with a good
    network and with the bad one. spoiled: requests."""

    fault: str
    ratio: float
    lowest: float
    highest: float
    held_before: float
    held: float
    agent_before: float
    agent: float
    spoiled: int


@dataclass(frozen=True, slots=True)
class Result:
    step: str
    steps_per_s: float
    rows: list[Row]


Choose = Callable[[Request], "Fault | None"]


def _faults(draw: random.Random) -> dict[str, Choose]:
    fifth = [SLOW_DOWN, UNREACHABLE, HANG, Fault(status=500)]
    return {
        "none": lambda _: None,
        "remote down": lambda _: UNREACHABLE,
        "20 % of requests fail": lambda _: draw.choice(fifth) if draw.random() < 0.2 else None,
        "resets in mid-body": lambda request: _reset(request) if draw.random() < 0.3 else None,
        "replies lost after commit": lambda request: (
            LOST_REPLY if request.method != "GET" and draw.random() < 0.3 else None
        ),
        "SlowDown": lambda _: SLOW_DOWN,
        _UPLINK: lambda _: None,
    }


def _reset(request: Request) -> Fault:
    return Fault(reset_after_bytes=200) if request.method == "GET" else Fault(reset_body_after_bytes=200)


@dataclass(frozen=True, slots=True)
class Moment:
    """When, and how much processor time the agent had used by then."""

    at: float
    agent_cpu_s: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Between two moments: steps a second, share of time in the session, processor seconds of the agent a second."""

    steps_per_s: float
    held: float
    agent: float


class Training:
    """The watched process."""

    def __init__(self, kind: str, folder: Path, proxy: FaultProxy, bucket: str, state_bytes: int, interval_s: float):
        self.stamps, self.log = folder / "stamps", open(folder / "log.txt", "w")
        options = proxy.options
        options["config_kwargs"]["read_timeout"] = 5
        script = [sys.executable, str(Path(__file__).with_name("outage_training.py"))]
        figures = map(str, (STEP_S, state_bytes, interval_s))
        self._process = subprocess.Popen(
            [*script, f"s3://{bucket}/run", str(folder / "local"), str(self.stamps), kind, *figures],
            env={**os.environ, "SPOT_STORAGE_OPTIONS": json.dumps(options), "PYTHONPATH": str(ROOT)},
            stdout=self.log,
            stderr=self.log,
        )
        self._status = folder / "local" / "run" / "journal" / "000001.agent.json"

    def wait_drained(self) -> None:
        """Until the checkpoint that was the newest one at the call is durable."""
        deadline, began = time.monotonic() + _DRAINED_S, time.time()
        while time.monotonic() < deadline and self._process.poll() is None:
            if self._status.exists() and self._status.stat().st_mtime > began:
                status = json.loads(self._status.read_text())
                if status["newest_durable"] and status["pending"] <= 1 and status["last_failure"] is None:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"the training did not drain: {Path(self.log.name).read_text()[-2000:]}")

    def between(self, begin: Moment, end: Moment) -> Speed:
        data = self.stamps.read_bytes()
        whole = data[: len(data) // STAMP.size * STAMP.size]
        inside = [stamp for stamp in STAMP.iter_unpack(whole) if begin.at <= stamp[0] <= end.at]
        if len(inside) < 2:
            raise RuntimeError(f"no two steps in {end.at - begin.at:.1f} s: {Path(self.log.name).read_text()[-2000:]}")
        seconds = end.at - begin.at
        return Speed(
            len(inside) / seconds,
            (inside[-1][1] - inside[0][1]) / seconds,
            (end.agent_cpu_s - begin.agent_cpu_s) / seconds,
        )

    def now(self) -> Moment:
        [agent] = (each for each in psutil.Process(self._process.pid).children() if "spot_core.agent" in each.cmdline())
        used = agent.cpu_times()
        return Moment(time.monotonic(), used.user + used.system)

    def close(self) -> None:
        Path(f"{self.stamps}.stop").touch()
        self._process.wait(60)
        self.log.close()


def measure(kind: str, folder: Path, *, seconds: float, repeat: int, state_bytes: int, interval_s: float) -> Result:
    folder.mkdir()
    speeds: dict[str, list[tuple[Speed, Speed]]] = defaultdict(list)
    spoiled: dict[str, int] = defaultdict(int)
    with S3Server() as server, FaultProxy(server.port) as proxy:
        training = Training(kind, folder, proxy, server.new_bucket(), state_bytes, interval_s)
        try:
            faults = list(_faults(random.Random(1)).items())
            for turn in range(repeat):
                for name, choose in faults[turn % len(faults) :] + faults[: turn % len(faults)]:
                    training.wait_drained()
                    begin, count = training.now(), len(proxy.fired)
                    time.sleep(seconds)
                    middle = training.now()
                    proxy.uplink_bytes_s = _UPLINK_BYTES_S if name == _UPLINK else None
                    proxy.chooses = choose
                    time.sleep(seconds)
                    end = training.now()
                    proxy.chooses, proxy.uplink_bytes_s = (lambda _: None), None
                    speeds[name].append((training.between(begin, middle), training.between(middle, end)))
                    spoiled[name] += len(proxy.fired) - count
        finally:
            training.close()
    good = statistics.median(before.steps_per_s for pairs in speeds.values() for before, _ in pairs)
    return Result(kind, good, [_row(name, pairs, spoiled[name]) for name, pairs in speeds.items()])


def _row(name: str, pairs: list[tuple[Speed, Speed]], spoiled: int) -> Row:
    ratios = [during.steps_per_s / before.steps_per_s for before, during in pairs]
    good, bad = zip(*pairs, strict=True)
    return Row(
        fault=name,
        ratio=statistics.median(ratios),
        lowest=min(ratios),
        highest=max(ratios),
        held_before=statistics.median(speed.held for speed in good),
        held=statistics.median(speed.held for speed in bad),
        agent_before=statistics.median(speed.agent for speed in good),
        agent=statistics.median(speed.agent for speed in bad),
        spoiled=spoiled,
    )


def table(found: Result) -> str:
    lines = [
        f"{found.step} step, {found.steps_per_s:.1f} steps/s with a good network",
        "",
        "| step rate / good | lowest to highest | in session, good | bad | agent, cores, good | bad | spoiled "
        "| network |",
        "|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {row.ratio:.3f} | {row.lowest:.3f} to {row.highest:.3f} | {row.held_before:.2%} | {row.held:.2%} "
        f"| {row.agent_before:.3f} | {row.agent:.3f} | {row.spoiled} | {row.fault} |"
        for row in found.rows
    ]
    return "\n".join(lines)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line.parser(__doc__, folder="work")
    parser.add_argument("--step", choices=["fixed", "cpu", "both"], default="both")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each half of a turn")
    parser.add_argument("--repeat", type=int, default=3, help="turns of each fault")
    parser.add_argument("--state", type=int, default=1_000_000, help="bytes of a checkpoint")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between checkpoints")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = _parse(argv)
    command_line.forget_variables()
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="outage-") as folder:
        for kind in ["fixed", "cpu"] if options.step == "both" else [options.step]:
            results.append(
                measure(
                    kind,
                    Path(folder) / kind,
                    seconds=options.seconds,
                    repeat=options.repeat,
                    state_bytes=options.state,
                    interval_s=options.interval,
                )
            )
            print(table(results[-1]), end="\n\n", flush=True)
    command_line.write_figures(options.json, results)


if __name__ == "__main__":
    main()
