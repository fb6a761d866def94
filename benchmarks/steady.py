"""What a long training pays: its speed with a checkpoint every 30 s, and its memory over 100 checkpoints.

    python benchmarks/steady.py --trainer hf|lightning --size lora|full|tiny|all [--seconds 30] [--repeat 3]

One training, a real Trainer with the callback, its agent draining to a second folder. Speed: segments of `--seconds`
with one checkpoint each, taken as they begin, and segments without take turns; a row is the ratio of their steps a
second, the median of the turns, the lowest and the highest. Copying, writing, digests, fsync and drain fall into the
segment. Memory: resident bytes of the training and of the agent after the 10th and after the last of `--saves`
checkpoints back to back, and the most after and during any of those between.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import command_line
import torch
from stall_states import SHAPES, make_model
from steady_course import Course, Memory

_STEPS = 20_000
_SETTLED = 10


@dataclass(frozen=True, slots=True)
class Resident:
    """Bytes that a process held: after the first ten saves, at the end, the most after any save since, and during."""

    process: str
    settled: int
    end: int
    most: int
    most_during: int


@dataclass(frozen=True, slots=True)
class Result:
    """One size under one trainer. ratio: of the step rate with checkpoints to that without, the median of the turns.

    late: checkpoints that were not durable when their segment ended. bytes: of the last one.
    """

    size: str
    trainer: str
    bytes: int
    seconds: float
    ratio: float
    lowest: float
    highest: float
    steps_per_s: float
    late: int
    saves: int
    memory: list[Resident]


def measure(trainer: str, size: str, folder: Path, *, seconds: float, repeat: int, saves: int) -> Result:
    train, stall = (importlib.import_module(f"{which}_{trainer}") for which in ("train", "stall"))
    train.quiet()
    shape = SHAPES[size]
    spot = stall.MeasuredSpotCallback(folder / "remote" / size, folder / "local", interval_s=seconds)
    course = Course(spot.hooks, saves=saves, seconds=seconds, repeat=repeat)
    callbacks = [train.AfterStep(course.step_ended), spot]
    train.training(make_model(shape), shape, folder / "trainer", steps=_STEPS, callbacks=callbacks)(None)
    ratios = [saved / unsaved for saved, unsaved in course.rates]
    return Result(
        size=size,
        trainer=train.TRAINER,
        bytes=spot.hooks.newest_bytes(),
        seconds=seconds,
        ratio=statistics.median(ratios),
        lowest=min(ratios),
        highest=max(ratios),
        steps_per_s=statistics.median(unsaved for _, unsaved in course.rates),
        late=course.late,
        saves=saves,
        memory=[_resident(name, course.memory, course.peaks) for name in ("trainer", "agent")],
    )


def _resident(process: str, after: list[Memory], during: list[Memory]) -> Resident:
    settled = min(_SETTLED, len(after)) - 1
    held = [getattr(each, process) for each in after[settled:]]
    peaks = [getattr(each, process) for each in during[settled:]]
    return Resident(process, held[0], held[-1], max(held), max(held + peaks))


def table(found: Result) -> str:
    lines = [
        f"{found.size}, {found.trainer}: a checkpoint of {found.bytes / 1e6:,.1f} MB every {found.seconds:g} s",
        "",
        "| step rate / without | lowest to highest | steps/s without | drained late |",
        "|---:|---:|---:|---:|",
        f"| {found.ratio:.3f} | {found.lowest:.3f} to {found.highest:.3f} | {found.steps_per_s:.2f} | {found.late} |",
        "",
        f"| memory after {found.saves} saves / after 10 | most / after 10 | after 10, MB | at the end | most | during "
        "| of |",
        "|---:|---:|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {row.end / row.settled:.3f} | {row.most / row.settled:.3f} | {row.settled / 1e6:,.1f} "
        f"| {row.end / 1e6:,.1f} | {row.most / 1e6:,.1f} | {row.most_during / 1e6:,.1f} | {row.process} |"
        for row in found.memory
    ]
    return "\n".join(lines)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line.parser(__doc__, folder="write checkpoints")
    parser.add_argument("--trainer", choices=["hf", "lightning"], default="hf")
    parser.add_argument("--size", choices=[*SHAPES, "all"], default="lora")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a segment, and between two checkpoints")
    parser.add_argument("--repeat", type=int, default=3, help="turns of two segments")
    parser.add_argument("--saves", type=int, default=100, help="checkpoints over which memory is watched")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = _parse(argv)
    command_line.forget_variables()
    logging.getLogger("spot_core").setLevel(logging.WARNING)
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="steady-") as name:
        for size in command_line.sizes_of(options.size):
            found = measure(
                options.trainer,
                size,
                Path(name) / size,
                seconds=options.seconds,
                repeat=options.repeat,
                saves=options.saves,
            )
            results.append(found)
            print(table(found), end="\n\n", flush=True)
    versions = importlib.import_module(f"train_{options.trainer}").VERSIONS
    command_line.write_figures(options.json, results, torch=torch.__version__, **versions)


if __name__ == "__main__":
    main()
