"""The ways to start that `relaunch.py` compares, each a process of its own that is killed after its first step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import psutil

ROOT = Path(__file__).resolve().parents[1]
PLAIN = "no callback"
_SCRIPT = Path(__file__).with_name("relaunch_training.py")
_ENDS_S = 300.0
_PART_BYTES = 16 << 20
_AT_ONCE = 4
# Images set it; then each start compiles every module that it imports, which is seconds of noise.
_COMPILES_EVERY_TIME = "PYTHONDONTWRITEBYTECODE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One way to start: what its process is told. read: reads the stored files where it finds them. lost: deleted
    before, so that nothing of an earlier start is there."""

    name: str
    told: dict[str, Any]
    read: Callable[[], None] = lambda: None
    lost: Path | None = None


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds to the end of the first step, from the process's start and from the Trainer's call; of a plain read."""

    start_s: float
    call_s: float
    read_s: float


class Starts:
    """Starts trainings of one size under one trainer. folder: to work in. s3: an S3 server, with a bucket's name."""

    def __init__(self, trainer: str, size: str, folder: Path, s3: tuple[dict[str, Any], str]) -> None:
        self._trainer, self._size, self._folder = trainer, size, folder
        self._options, self._bucket = s3
        self._kept, self._remote = folder / "kept", folder / "remote" / "run"
        self._log = folder / "log.txt"

    def store(self) -> int:
        """Train until a checkpoint is on the remote, and copy that to S3; returns the checkpoint's bytes."""
        self._run({"remote": str(self._remote), "local": str(self._kept), "until_durable": True})
        fsspec.filesystem("s3", **self._options).put(str(self._remote), f"{self._bucket}/run", recursive=True)
        return sum(file.stat().st_size for file in self._files(self._remote))

    def ways(self) -> list[Start]:
        """All of them; the plain one first, the others compare with it."""
        new = self._folder / "new"
        here, s3 = {"remote": str(self._remote)}, {"remote": f"s3://{self._bucket}/run"}
        return [
            Start(name=PLAIN, told={}),
            Start(
                name=f"{PLAIN}, the Trainer loads the same files",
                told={"resume": str(self._native())},
                read=lambda: self._read(self._kept / "run"),
            ),
            Start(name="first start", told={"remote": str(new / "remote" / "run"), "local": str(new)}, lost=new),
            Start(
                name="local tier", told={**here, "local": str(self._kept)}, read=lambda: self._read(self._kept / "run")
            ),
            Start(
                name="remote, a folder",
                told={**here, "local": str(new)},
                read=lambda: self._read(self._remote),
                lost=new,
            ),
            Start(name="remote, S3", told={**s3, "local": str(new)}, read=self._read_s3, lost=new),
        ]

    def measure(self, start: Start) -> Times:
        if start.lost is not None:
            shutil.rmtree(start.lost, ignore_errors=True)
        began = time.monotonic()
        start.read()
        read_s = time.monotonic() - began
        began, called, stepped = self._run(start.told)
        return Times(stepped - began, stepped - called, read_s)

    def _run(self, told: dict[str, Any]) -> tuple[float, float, float]:
        """Start a process; when it was started, when it called the Trainer and when its first step was done."""
        about = {"trainer": self._trainer, "size": self._size, "folder": str(self._folder / "trainer"), **told}
        kept = {name: value for name, value in os.environ.items() if name != _COMPILES_EVERY_TIME}
        began = time.monotonic()
        with open(self._log, "w") as log:
            process = subprocess.Popen(
                [sys.executable, str(_SCRIPT), json.dumps(about)],
                env={**kept, "SPOT_STORAGE_OPTIONS": json.dumps(self._options), "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith('{"called"')), None)
            agents = psutil.Process(process.pid).children(recursive=True) if line is not None else []
            process.kill()
            process.wait()
        psutil.wait_procs(agents, _ENDS_S)  # what they still drain must not slow the next start down
        if line is None:
            raise RuntimeError(f"{told} ended early: {self._log.read_text()[-3000:]}")
        marks = json.loads(line)
        return began, marks["called"], marks["stepped"]

    # -- what is stored --------------------------------------------------------------------------------------

    def _native(self) -> Path:
        [native] = (self._newest(self._kept / "run")).glob("checkpoint-*" if self._trainer == "hf" else "*.ckpt")
        return native

    def _newest(self, run: Path) -> Path:
        return max((run / "checkpoints").iterdir())

    def _files(self, run: Path) -> list[Path]:
        return [path for path in self._newest(run).rglob("*") if path.is_file()]

    def _read(self, run: Path) -> None:
        buffer = bytearray(_PART_BYTES)
        for path in self._files(run):
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def _read_s3(self) -> None:
        """In ranges, which s3fs repeats after a reset, four at a time; the agent has its own way, see `storage.py`."""
        fs = fsspec.filesystem("s3", **self._options)
        for path in self._files(self._remote):
            key, size = f"{self._bucket}/run/{path.relative_to(self._remote)}", path.stat().st_size

            def fetch(start: int) -> bytes:
                return bytes(fs.cat_file(key, start=start, end=min(size, start + _PART_BYTES)))  # noqa: B023

            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(fetch, range(0, size, _PART_BYTES)))
