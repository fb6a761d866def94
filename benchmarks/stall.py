"""How long a checkpoint holds up the training thread: this project beside the alternatives, in one training run.

    python benchmarks/stall.py --size lora|full|tiny|all [--repeat 5] [--json FILE] [--folder FOLDER]

One Trainer trains; after every second step one of the savers checkpoints it, in turn, and the order rotates. The
first round, in which buffers are allocated, is not counted. Reported are medians:
- stall: from the end of an optimizer step, the time spent in the saver's calls until the next one may begin;
- next step: forward and backward right after the save, over those of the undisturbed step right before. What the
  saver does in the background slows them down; that is not part of the stall, so it is shown.
Before the next save everything in the background is waited for. Not measured: CUDA, several processes, a disk that
is slower than training, uploads (the agent's drain goes to a folder on the same disk).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from stall_savers import CopySaver, DcpReusingSaver, DcpSaver, Saver, TorchSaver, TrainerSaver
from stall_spot import CoreSaver, MeasuredSpotCallback, SpotIdle, SpotSaver
from stall_states import SHAPES, make_trainer
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spot_core.snapshot.files import tensors_of

SAVERS: tuple[type[Saver], ...] = (
    SpotSaver,
    SpotIdle,
    CoreSaver,
    DcpSaver,
    DcpReusingSaver,
    TrainerSaver,
    TorchSaver,
    CopySaver,
)


@dataclass(frozen=True, slots=True)
class Row:
    """One saver. stall_s: median, and the shortest and longest. next_step: median ratio to the step before."""

    saver: str
    stall_s: float
    shortest_s: float
    longest_s: float
    next_step: float


@dataclass(frozen=True, slots=True)
class Result:
    """One size. forward_s: median of forward and backward while nothing is saved."""

    size: str
    tensors: int
    bytes: int
    repeat: int
    forward_s: float
    rows: list[Row]


class Rotation(TrainerCallback):  # type: ignore[misc]
    """Lets the savers take turns: one save, the step it overlaps with, one undisturbed step."""

    def __init__(self, folder: Path, *, repeat: int) -> None:
        self._folder, self._repeat = folder, repeat
        self.trainer: Trainer | None = None
        self._savers: list[Saver] = []
        self._turns: list[tuple[Saver, bool]] = []
        self._current: tuple[Saver, bool] | None = None
        self._held_s = self._began = self._forward_s = 0.0
        self.stalls: dict[str, list[float]] = defaultdict(list)
        self.slowdowns: dict[str, list[float]] = defaultdict(list)
        self.undisturbed: list[float] = []
        self.tensors: list[torch.Tensor] = []

    @property
    def steps(self) -> int:
        """Two for each turn, one before the first and one after the last, which the callback ends in its own way."""
        return 2 * len(SAVERS) * (self._repeat + 1) + 2

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._forward_s = time.perf_counter() - self._began
        if self._current is not None:
            self._hold(self._current[0].gate)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._savers:
            self._prepare()
        if self._current is not None:
            self._record(*self._current)
            self._current = None
            return
        self.undisturbed.append(self._forward_s)
        if self._turns:
            self._current = self._turns.pop(0)
            self._held_s = 0.0
            self._hold(self._current[0].start)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for saver in self._savers:
            saver.close()

    def _prepare(self) -> None:
        assert self.trainer is not None
        savers = [kind(self.trainer, self._folder) for kind in SAVERS]
        for round_ in range(self._repeat + 1):
            first = round_ % len(savers)
            self._turns += [(saver, round_ > 0) for saver in savers[first:] + savers[:first]]
        self.tensors = list(tensors_of(savers[0].state()))
        self._savers = savers

    def _hold(self, call: Callable[[], None]) -> None:
        began = time.perf_counter()
        call()
        self._held_s += time.perf_counter() - began

    def _record(self, saver: Saver, is_counted: bool) -> None:
        saver.settle()
        if is_counted:
            self.stalls[saver.name].append(self._held_s + saver.elsewhere_s)
            self.slowdowns[saver.name].append(self._forward_s / self.undisturbed[-1])


def measure(size: str, folder: Path, *, repeat: int) -> Result:
    """Train one size and return its rows."""
    callback = MeasuredSpotCallback(folder / "remote" / size, folder / "local")
    rotation = Rotation(folder / "others", repeat=repeat)
    trainer = make_trainer(SHAPES[size], folder / "trainer", steps=rotation.steps, callbacks=[rotation, callback])
    trainer.remove_callback(PrinterCallback)
    rotation.trainer = trainer
    trainer.train()
    rows = [
        Row(
            saver=name,
            stall_s=statistics.median(stalls),
            shortest_s=min(stalls),
            longest_s=max(stalls),
            next_step=statistics.median(rotation.slowdowns[name]),
        )
        for name, stalls in sorted(rotation.stalls.items())
    ]
    bytes_ = sum(tensor.numel() * tensor.dtype.itemsize for tensor in rotation.tensors)
    return Result(size, len(rotation.tensors), bytes_, repeat, statistics.median(rotation.undisturbed), rows)


def report(result: Result) -> str:
    """A table, ratios first, shortest stall at the top."""
    ours = next(row for row in result.rows if row.saver == SpotSaver.name)
    lines = [
        f"{result.size}: {result.tensors} tensors, {result.bytes / 1e6:.0f} MB, forward and backward "
        f"{result.forward_s * 1e3:.0f} ms, medians of {result.repeat}",
        "",
        "| stall / ours | stall, ms | shortest to longest | next step | saver |",
        "|---:|---:|---:|---:|---|",
    ]
    for row in sorted(result.rows, key=lambda row: row.stall_s):
        span = f"{row.shortest_s * 1e3:.2f} to {row.longest_s * 1e3:.2f}"
        lines.append(
            f"| {row.stall_s / ours.stall_s:.2f} | {row.stall_s * 1e3:.2f} | {span} "
            f"| × {row.next_step:.2f} | {row.saver} |"
        )
    return "\n".join(lines)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SHAPES, "all"], default="lora")
    parser.add_argument("--repeat", type=int, default=5, help="rounds that are counted")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--folder", type=Path, help="write checkpoints here; default: a temporary folder")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = _parse(argv)
    for name in [name for name in os.environ if name.startswith("SPOT_")]:
        del os.environ[name]  # they would move the checkpoints
    transformers.logging.set_verbosity_error()
    logging.getLogger("spot_core").setLevel(logging.WARNING)
    sizes = ["lora", "full"] if options.size == "all" else [options.size]
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="stall-") as name:
        dist.init_process_group("gloo", init_method=f"file://{name}/group", rank=0, world_size=1)
        for size in sizes:
            results.append(measure(size, Path(name) / size, repeat=options.repeat))
            print(report(results[-1]), end="\n\n")
        dist.destroy_process_group()
    if options.json is not None:
        about = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "results": [asdict(result) for result in results],
        }
        options.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
