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
import json
import logging
import os
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from stall_report import table
from stall_states import SHAPES


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=["hf", "lightning"], default="hf")
    parser.add_argument("--size", choices=[*SHAPES, "all"], default="lora")
    parser.add_argument("--repeat", type=int, default=5, help="rounds that are counted")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--folder", type=Path, help="write checkpoints here; default: a temporary folder")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = _parse(argv)
    for name in [name for name in os.environ if name.startswith("SPOT_")]:
        del os.environ[name]  # they would move the checkpoints
    logging.getLogger("spot_core").setLevel(logging.WARNING)
    under = importlib.import_module(f"stall_{options.trainer}")  # the other trainer need not be installed
    sizes = ["lora", "full"] if options.size == "all" else [options.size]
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="stall-") as name:
        for size in sizes:
            results.append(under.measure(size, Path(name) / size, repeat=options.repeat))
            print(table(results[-1]), end="\n\n", flush=True)
    if options.json is not None:
        about = {
            "torch": torch.__version__,
            **importlib.import_module(f"train_{options.trainer}").VERSIONS,
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "results": [asdict(result) for result in results],
        }
        options.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
