"""What an interval policy is worth: this project's cadence beside the alternatives, replayed on lives of instances.

    python benchmarks/goodput.py --traces DIR [--json FILE] [--plots DIR]

DIR holds CSV files of real lives (columns series, start_s, lifetime_s, censored and, if known, resolution_s); synthetic
lives (exponential, Weibull 0.6, a bathtub with a 24 h cap, a drifting rate) are always replayed. Each trace is replayed
in every setting of stall C, upload U, restart R, announced share q and its lead W, and once more with a slowdown of
10 % while a checkpoint is uploaded. Policies:
- adaptive: `spot_core.cadence` itself. Every series starts without history;
- fixed-…: the same interval for all; 500 steps are 500 s here;
- budget-3.5%: the shortest interval whose stalls cost 3.5 %, as CheckFreq chooses it;
- young-daly-oracle: sqrt(2·(C + eps·U)·M), M the trace's true mean time to preemption;
- best-fixed-hindsight: the best of 125 fixed intervals, chosen for this trace and setting after the fact;
- knows-every-death: one checkpoint a life, durable in its last second.
Goodput is training kept per second of instance time; a point is 1 %. The model is in `goodput_replay.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from goodput_plots import plot_goodput, plot_life
from goodput_replay import STEP_S, Fixed, Outcome, Setting, adaptive, endings, knows_every_death
from goodput_traces import Trace, read_traces, synthetic_traces

# Series of a trace are repeated, with other draws, until it has about so many lives: small traces are noisy.
LIVES = 500
ADAPTIVE, BEST, KNOWING, DEFAULT = "adaptive", "best-fixed-hindsight", "knows-every-death", "fixed-500-steps"


@dataclass(frozen=True, slots=True)
class Row:
    """One trace under one policy in one setting; times in seconds, shares from 0 to 1."""

    trace: str
    stall_s: float
    upload_s: float
    restart_s: float
    announced: float
    lead_s: float
    slowdown: float
    policy: str
    goodput: float
    lost_s_per_preemption: float


# Values of C, U, R, q and W.
GRIDS = {
    "all": ((0.02, 1.0, 30.0), (1.0, 20.0, 300.0), (30.0, 180.0), (0.0, 0.5, 0.9), (30.0, 120.0)),
    "tiny": ((1.0,), (20.0,), (30.0,), (0.0, 0.9), (30.0,)),
}


def settings(size: str) -> list[Setting]:
    grid = itertools.product(*GRIDS[size])
    plain = [
        Setting(stall_s=stall_s, upload_s=upload_s, restart_s=restart_s, announced=announced, lead_s=lead_s)
        for stall_s, upload_s, restart_s, announced, lead_s in grid
    ]
    slowed = [
        Setting(stall_s=0.02, upload_s=upload_s, restart_s=30.0, announced=0.0, lead_s=30.0, slowdown=0.1)
        for upload_s in GRIDS[size][1]
    ]
    return plain + slowed


def replay(work: tuple[Trace, Setting]) -> list[Row]:
    """One trace in one setting under every policy."""
    trace, setting = work
    lives = endings(trace, setting)
    fixed = Fixed(lives, setting)
    young_s = math.sqrt(2.0 * setting.costs.effective_s * trace.mean_s)
    found: dict[str, Outcome] = {
        ADAPTIVE: adaptive(lives, setting),
        DEFAULT: fixed.outcome(500 * STEP_S),
        **{f"fixed-{seconds}s": fixed.outcome(seconds) for seconds in (600, 1800, 3600)},
        "budget-3.5%": fixed.outcome(setting.stall_s / 0.035),
        "young-daly-oracle": fixed.outcome(young_s),
        BEST: fixed.best()[1],
        KNOWING: knows_every_death(lives, setting),
    }
    return [
        Row(
            trace.name,
            **asdict(setting),
            policy=name,
            goodput=kept.goodput,
            lost_s_per_preemption=kept.lost_s_per_preemption,
        )
        for name, kept in found.items()
    ]


def summary(rows: list[Row]) -> str:
    """Regret of the adaptive policy in points of goodput, and each policy's goodput, averaged over settings."""
    by_setting: defaultdict[tuple[object, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        key = (row.trace, row.stall_s, row.upload_s, row.restart_s, row.announced, row.lead_s, row.slowdown)
        by_setting[key][row.policy] = row
    traces = list(dict.fromkeys(row.trace for row in rows))
    policies = list(dict.fromkeys(row.policy for row in rows))
    lines = [
        "adaptive below the best fixed interval in hindsight, points of goodput: worst and mean of settings",
        "",
    ]
    stalls = sorted({row.stall_s for row in rows})
    lines.append(f"{'trace':26}" + "".join(f"{f'C = {stall_s:g} s':>18}" for stall_s in stalls))
    for trace in traces:
        cells = []
        for stall_s in stalls:
            regrets = [
                100 * (found[BEST].goodput - found[ADAPTIVE].goodput)
                for key, found in by_setting.items()
                if key[0] == trace and key[1] == stall_s
            ]
            cells.append(f"{max(regrets):9.2f} {statistics.mean(regrets):8.2f}")
        lines.append(f"{trace:26}" + "".join(cells))
    lines += ["", "goodput at C = 1 s, U = 20 s, R = 30 s, nothing announced; seconds lost a preemption", ""]
    lines.append(f"{'policy':22}" + "".join(f"{trace[:17]:>19}" for trace in traces))
    for policy in policies:
        cells = []
        for trace in traces:
            row = by_setting[trace, 1.0, 20.0, 30.0, 0.0, 30.0, 0.0][policy]
            cells.append(f"{row.goodput:11.4f} {row.lost_s_per_preemption:7.0f}")
        lines.append(f"{policy:22}" + "".join(cells))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, help="folder with CSV files of real lives; default: synthetic ones only")
    parser.add_argument("--json", type=Path, help="write one row per trace, setting and policy to this file")
    parser.add_argument("--plots", type=Path, help="write goodput.png and interval.png to this folder")
    parser.add_argument("--size", choices=GRIDS, default="all", help="how many settings; tiny: seconds, for the tests")
    parser.add_argument("--lives", type=int, default=LIVES, help="repeat a trace's series up to about so many lives")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    if options.traces is not None and not any(options.traces.glob("*.csv")):
        parser.error(f"{options.traces} has no CSV files of lives")
    if options.traces is None:
        print("no --traces: only synthetic lives are replayed\n")
    real = read_traces(options.traces) if options.traces else []
    traces = [
        trace.repeated(options.lives, seed=options.seed) for trace in [*real, *synthetic_traces(seed=options.seed)]
    ]
    # Long ones first, so that no process is left with one at the end.
    work = sorted(
        itertools.product(traces, settings(options.size)), key=lambda item: (item[1].stall_s, -len(item[0].lives))
    )
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = [row for found in pool.map(replay, work, chunksize=4) for row in found]
    order = {trace.name: nth for nth, trace in enumerate(traces)}
    rows.sort(key=lambda row: order[row.trace])
    print(summary(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if options.plots:
        options.plots.mkdir(parents=True, exist_ok=True)
        plot_goodput(rows, options.plots / "goodput.png")
        plot_life(max(traces, key=lambda trace: max(map(len, trace.series))), options.plots / "interval.png")


if __name__ == "__main__":
    main()
