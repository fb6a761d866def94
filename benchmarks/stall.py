"""How long a checkpoint holds up the training thread: this project beside the alternatives, in one training run.

    python benchmarks/stall.py --trainer hf|lightning --size lora|full|tiny|all [--repeat 5] [--json FILE]

One Trainer trains; after every second step one of the savers checkpoints it, in turn, and the order rotates. The
first round, in which buffers are allocated, is not counted. Reported are medians:
- stall: from the end of an optimizer step, the time spent in the saver's calls until the next one may begin;
- next step: forward and backward right after the save, over those of the undisturbed step right before. What the
  saver does in the background slows them down; that is not part of the stall, so it is shown;
- files: the size of one checkpoint.
Before the next save everything in the background is waited for. Not measured: CUDA, several processes, a disk that
is slower than training, uploads (the agent's drain goes to a folder on the same disk).
"""

from __future__ import annotations

import argparse
import importlib
import logging
import tempfile
from pathlib import Path

import command_line
import torch
from stall_report import table
from stall_states import SHAPES


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line.parser(__doc__, folder="write checkpoints")
    parser.add_argument("--trainer", choices=["hf", "lightning"], default="hf")
    parser.add_argument("--size", choices=[*SHAPES, "all"], default="lora")
    parser.add_argument("--repeat", type=int, default=5, help="rounds that are counted")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = _parse(argv)
    command_line.forget_variables()
    logging.getLogger("spot_core").setLevel(logging.WARNING)
    under = importlib.import_module(f"stall_{options.trainer}")  # the other trainer need not be installed
    sizes = command_line.sizes_of(options.size)
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="stall-") as name:
        for size in sizes:
            results.append(under.measure(size, Path(name) / size, repeat=options.repeat))
            print(table(results[-1]), end="\n\n", flush=True)
    versions = importlib.import_module(f"train_{options.trainer}").VERSIONS
    command_line.write_figures(options.json, results, torch=torch.__version__, **versions)


if __name__ == "__main__":
    main()
