"""How long the same command takes to train on: from the start of the process to the end of the first optimizer step.

    python benchmarks/relaunch.py --trainer hf|lightning --size lora|full|tiny|all [--repeat 3] [--json FILE]

Each start is a process of its own, and the ways to start take turns in an order drawn for each round. Reported are
medians:
- / plain: from the start of the process, over that without the callback in the same round. Imports and the model are
  most of it, and the same for all;
- from call: from the call of `train` or `fit`, which leaves them out;
- over: what is left of the first after subtracting the plain start and reading the checkpoint's files from the same
  place. What is behind it: the agent's start, listing, verification, claim, loading and comparing. Fastest: the same of
  each way's fastest start and read, which other work on the machine disturbs least.
A page cache holds all files: what a disk or a network takes is in neither of the two. The S3 server is the one that
SPOT_TEST_S3_ENDPOINT names (`python -m tests.radosgw` starts one), moto otherwise.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import command_line
from relaunch_starts import PLAIN, ROOT, Starts, Times

sys.path.insert(0, str(ROOT))  # the server of the tests

from tests.servers import ENDPOINT, server_at


@dataclass(frozen=True, slots=True)
class Row:
    """One way to start. over_s: beyond the plain start and a plain read, from the start of the process; over_call_s:
    the same from the Trainer's call. lowest, highest: of over_s. fastest: over_s of the fastest of each."""

    start: str
    ratio: float
    start_s: float
    call_s: float
    read_s: float
    over_s: float
    lowest_s: float
    highest_s: float
    fastest_s: float
    over_call_s: float


@dataclass(frozen=True, slots=True)
class Result:
    """One size under one trainer. bytes: of the checkpoint."""

    size: str
    trainer: str
    bytes: int
    repeat: int
    rows: list[Row]


def measure(trainer: str, size: str, folder: Path, endpoint: str | None, *, repeat: int, only: Sequence[str]) -> Result:
    folder.mkdir(parents=True)
    times: dict[str, list[Times]] = defaultdict(list)
    with server_at(endpoint) as server:
        starts = Starts(trainer, size, folder, (server.options, server.new_bucket()))
        stored = starts.store()
        ways = [way for way in starts.ways() if way.name == PLAIN or not only or way.name in only]
        drawn = random.Random(0)
        for _ in range(repeat):
            for way in drawn.sample(ways, len(ways)):
                times[way.name].append(starts.measure(way))
    plain = times[PLAIN]
    return Result(size, trainer, stored, repeat, [_row(way.name, times[way.name], plain) for way in ways])


def _row(name: str, times: list[Times], plain: list[Times]) -> Row:
    over = [each.start_s - without.start_s - each.read_s for each, without in zip(times, plain, strict=True)]
    pairs = list(zip(times, plain, strict=True))
    return Row(
        start=name,
        ratio=statistics.median(each.start_s / without.start_s for each, without in pairs),
        start_s=statistics.median(each.start_s for each in times),
        call_s=statistics.median(each.call_s for each in times),
        read_s=statistics.median(each.read_s for each in times),
        over_s=statistics.median(over),
        lowest_s=min(over),
        highest_s=max(over),
        fastest_s=min(each.start_s for each in times)
        - min(each.start_s for each in plain)
        - min(each.read_s for each in times),
        over_call_s=statistics.median(each.call_s - without.call_s - each.read_s for each, without in pairs),
    )


def table(found: Result) -> str:
    lines = [
        f"{found.size}, {found.trainer}: a checkpoint of {found.bytes / 1e6:,.0f} MB, medians of {found.repeat}",
        "",
        "| / plain | over, s | lowest to highest | fastest | over from call, s "
        "| start, s | from call, s | read, s | start |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {row.ratio:.2f} | {row.over_s:.2f} | {row.lowest_s:.2f} to {row.highest_s:.2f} "
        f"| {row.fastest_s:.2f} | {row.over_call_s:.2f} "
        f"| {row.start_s:.2f} | {row.call_s:.2f} | {row.read_s:.2f} | {row.start} |"
        for row in found.rows
    ]
    return "\n".join(lines)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line.parser(__doc__, folder="work")
    parser.add_argument("--trainer", choices=["hf", "lightning"], default="hf")
    parser.add_argument("--size", choices=["tiny", "lora", "full", "all"], default="lora")
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--only", nargs="+", default=[], metavar="START", help="these beside the plain one, by name")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = _parse(argv)
    endpoint = os.environ.get(ENDPOINT)
    command_line.forget_variables()
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="relaunch-") as name:
        for size in command_line.sizes_of(options.size):
            folder = Path(name) / size
            results.append(measure(options.trainer, size, folder, endpoint, repeat=options.repeat, only=options.only))
            print(table(results[-1]), end="\n\n", flush=True)
    if options.json is not None:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "lightning")}
        command_line.write_figures(options.json, results, **versions)


if __name__ == "__main__":
    main()
