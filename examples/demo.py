"""The demonstration behind `make demo`: a LoRA fine-tune through real kills ends bit-equal to one never killed.

1. The fine-tune of lora.yaml, uninterrupted and without the callback.
2. The same command under `spot chaos`: SIGKILL at random moments, one of them losing the local tier as well, and
   each time simply run again.
3. Every tensor of both final adapters compared.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
KILLS = 5


def train(output: Path) -> list[str]:
    return [sys.executable, str(HERE / "lora_finetune_hf.py"), str(HERE / "lora.yaml"), "--output_dir", str(output)]


def run(title: str, command: list[str], **environment: str) -> str:
    """Run a command, show what it prints and return it; leave if it fails."""
    print(f"\n== {title}\n   {' '.join(command)}", flush=True)
    quiet = {"PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1", "TRANSFORMERS_VERBOSITY": "error"}
    lines = []
    with subprocess.Popen(command, env={**os.environ, **quiet, **environment}, stdout=subprocess.PIPE, text=True) as it:
        for line in it.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    if it.returncode != 0:
        sys.exit(f"demo: this command ended with exit code {it.returncode}")
    return "".join(lines)


def kill_every_s(wall_s: float, printed: str) -> float:
    """Mean seconds between kills such that no life can do more than a quarter of the training: at least 4 kills.

    wall_s: of the uninterrupted run, which printed its training time. A kill comes after at most 1.5 times the mean.
    """
    training_s = float(re.findall(r"'train_runtime': '?([\d.]+)", printed)[-1])
    return (wall_s - training_s + training_s / 4) / 1.5


def different_tensors(one: Path, other: Path) -> list[str]:
    """Names of tensors that are not equal, bit for bit, in two adapters."""
    a, b = load_file(one), load_file(other)
    same = {key for key in a.keys() & b.keys() if torch.equal(a[key], b[key])}
    return sorted((a.keys() | b.keys()) - same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="emptied first")
    parser.add_argument("--kill-every", type=float, help="mean seconds between kills; by default four at least")
    parser.add_argument("--seed", type=int, default=None, help="makes the moments of the kills repeatable")
    options = parser.parse_args()
    folder = options.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    # 1. Without the callback: an empty remote leaves it out.
    calm = folder / "uninterrupted"
    began = time.monotonic()
    printed = run("uninterrupted, without the callback", [*train(calm), "--spot_remote", ""])
    kill_every = options.kill_every or kill_every_s(time.monotonic() - began, printed)

    # 2. Hours of training are seconds here, so the interval is pinned to seconds too; it adapts by itself otherwise.
    stormy = folder / "killed"
    chaos = [sys.executable, "-m", "spot_core.report.cli", "chaos", "--kill-every", f"{kill_every:.1f}"]
    chaos += ["--lives", str(KILLS), "--wipe", "3"]
    chaos += ["--remote", str(folder / "remote" / "lora-demo"), "--local", str(folder / "nvme")]
    chaos += [] if options.seed is None else ["--seed", str(options.seed)]
    run(f"the same through {KILLS} kills", [*chaos, "--", *train(stormy)], SPOT_INTERVAL_S="1.5")

    # 3.
    different = different_tensors(*(each / "final" / "adapter_model.safetensors" for each in (calm, stormy)))
    print(f"\nidentical to the uninterrupted run: {'no, ' + ', '.join(different[:5]) if different else 'yes'}")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
