"""The demonstration behind `make demo`: a LoRA fine-tune through real kills ends bit-equal to one never killed.

For each trainer, Hugging Face and Lightning:
1. The fine-tune of its configuration, uninterrupted and without the callback.
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
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
KILLS, LEAST_KILLS = 5, 4


@dataclass(frozen=True)
class FineTune:
    """One of the examples: its command, two changes to that, and where it prints how long it trained."""

    title: str
    command: tuple[str, ...]
    to_folder: str  # the flag that names the output folder; the adapter ends in `final` there
    unprotected: tuple[str, ...]  # the flags that leave the callback out
    training_s: str  # a pattern, its group the seconds

    def to(self, folder: Path) -> list[str]:
        return [sys.executable, *self.command, self.to_folder, str(folder)]


FINE_TUNES = {
    "hf": FineTune(
        title="Hugging Face Trainer",
        command=(str(HERE / "lora_finetune_hf.py"), str(HERE / "lora.yaml")),
        to_folder="--output_dir",
        unprotected=("--spot_remote", ""),
        training_s=r"'train_runtime': '?([\d.]+)",
    ),
    "lightning": FineTune(
        title="Lightning",
        command=(str(HERE / "lora_finetune_lightning.py"), "fit", "--config", str(HERE / "lora_lightning.yaml")),
        to_folder="--trainer.default_root_dir",
        unprotected=("--trainer.callbacks", "null"),
        training_s=r"finished at step \d+ after ([\d.]+) s",
    ),
}


def run(title: str, command: list[str], **environment: str) -> str:
    """Run a command, show what it prints and return it; leave if it fails."""
    print(f"\n== {title}\n   {' '.join(command)}", flush=True)
    quiet = {"PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1", "TRANSFORMERS_VERBOSITY": "error"}
    # A SPOT_REMOTE of the caller's would protect the uninterrupted run as well.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("SPOT_")}
    lines = []
    with subprocess.Popen(command, env={**outer, **quiet, **environment}, stdout=subprocess.PIPE, text=True) as it:
        for line in it.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    if it.returncode != 0:
        sys.exit(f"demo: this command ended with exit code {it.returncode}")
    return "".join(lines)


def kill_every_s(wall_s: float, training_s: float) -> float:
    """Mean seconds between kills for LEAST_KILLS at least: no life can do more than that part of the training.

    Both of the uninterrupted run. A kill comes after at most 1.5 times the mean.
    """
    return (wall_s - training_s + training_s / LEAST_KILLS) / 1.5


def different_tensors(one: Path, other: Path) -> list[str]:
    """Names of tensors that are not equal, bit for bit, in two adapters."""
    a, b = load_file(one), load_file(other)
    same = {key for key in a.keys() & b.keys() if torch.equal(a[key], b[key])}
    return sorted((a.keys() | b.keys()) - same)


def rehearse(it: FineTune, folder: Path, mean_s: float, seed: int | None) -> int:
    """Step 2, from nothing; how many kills there were."""
    for used in ("killed", "remote", "nvme"):
        shutil.rmtree(folder / used, ignore_errors=True)
    chaos = [sys.executable, "-m", "spot_core.report.cli", "chaos", "--kill-every", f"{mean_s:.1f}"]
    chaos += ["--lives", str(KILLS), "--wipe", "3"]
    chaos += ["--remote", str(folder / "remote" / "lora-demo"), "--local", str(folder / "nvme")]
    chaos += [] if seed is None else ["--seed", str(seed)]
    # Hours of training are seconds here, so the interval is pinned to seconds too; it adapts by itself otherwise.
    title = f"{it.title}: the same through up to {KILLS} kills"
    printed = run(title, [*chaos, "--", *it.to(folder / "killed")], SPOT_INTERVAL_S="1.5")
    return int(re.findall(r"^(\d+) lives,", printed, re.MULTILINE)[-1]) - 1  # the last one finished


def demonstrate(it: FineTune, folder: Path, kill_every: float | None, seed: int | None) -> bool:
    """The three steps in `folder`; whether both adapters are equal."""
    calm, stormy = folder / "uninterrupted", folder / "killed"
    began = time.monotonic()
    printed = run(f"{it.title}: uninterrupted, without the callback", [*it.to(calm), *it.unprotected])
    wall_s, training_s = time.monotonic() - began, float(re.findall(it.training_s, printed)[-1])
    mean_s = kill_every or kill_every_s(wall_s, training_s)
    while rehearse(it, folder, mean_s, seed) < LEAST_KILLS and not kill_every:
        print("\ntoo few kills: this machine was slower when it was measured. Again, twice as often.", flush=True)
        mean_s /= 2

    different = different_tensors(*(each / "final" / "adapter_model.safetensors" for each in (calm, stormy)))
    answer = "no, " + ", ".join(different[:5]) if different else "yes"
    print(f"\n{it.title}: identical to the uninterrupted run: {answer}", flush=True)
    return not different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=[*FINE_TUNES, "both"], default="both")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="emptied first")
    parser.add_argument("--kill-every", type=float, help="mean seconds between kills; by default four at least")
    parser.add_argument("--seed", type=int, default=None, help="makes the moments of the kills repeatable")
    options = parser.parse_args()
    folder = options.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)

    chosen = FINE_TUNES if options.trainer == "both" else [options.trainer]
    # A list, so that the second runs whatever became of the first.
    equal = [demonstrate(FINE_TUNES[name], folder / name, options.kill_every, options.seed) for name in chosen]
    sys.exit(0 if all(equal) else 1)


if __name__ == "__main__":
    main()
