"""Commits checkpoint B again and again, each time in a fork that kills itself at another file operation.

Run as a process of its own, which imports torch once and has no other threads when it forks:
`python -m tests.store.commit_crashes TEMPLATE FOLDER` copies TEMPLATE (a run's tiers, with or without a checkpoint A)
for every crash point and prints one JSON line for each, the last one being the commit that was left alone.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors  # noqa: F401  imported before the forks, like torch
import torch

from spot_core.snapshot.capture import Snapshotter
from spot_core.snapshot.files import BytesFile, SafetensorsFile, TorchFile
from spot_core.snapshot.writer import CheckpointWriter, Written
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.posix import PosixTier

A, B = CheckpointName(1, 10), CheckpointName(1, 20)
MOMENTS = ("before", "midway", "after")
_PATCHED = ("write", "fsync", "replace", "rename", "link", "mkdir", "unlink", "rmdir", "open")


class Killer:
    """Counts file operations of this process and ends it with SIGKILL at one of them, which it notes in a file."""

    def __init__(self, nth: int, when: str, note: Path) -> None:
        self._nth, self._when = nth, when
        self._note = os.open(note, os.O_WRONLY | os.O_CREAT, 0o600)
        self._write = os.write
        self.count = 0

    def install(self) -> None:
        for name in _PATCHED:
            setattr(os, name, self._counted(f"os.{name}", getattr(os, name)))
        builtins.open = io.open = self._counted("open", builtins.open)

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count != self._nth:
                return function(*args, **kwargs)
            self._write(self._note, f"{name}({args[0]!r})".encode())
            try:
                if self._when == "after":
                    function(*args, **kwargs)
                elif self._when == "midway" and name == "os.write":
                    function(args[0], bytes(args[1])[: len(args[1]) // 2])
            finally:
                self.end()

        return call

    def end(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def commit_b(folder: Path, killer: Killer) -> Written:
    """One checkpoint of every kind of file, through the writer."""
    tier, snapshotter = PosixTier(folder / "local"), Snapshotter(torch.device("cpu"))
    writer, results = CheckpointWriter(tier, snapshotter, number=B.incarnation), list[Written]()
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(5, dtype=torch.int8)}
    files = [
        SafetensorsFile(path="checkpoint-20/model.safetensors", tensors=tensors),
        TorchFile(path="checkpoint-20/optimizer.pt", tree={"state": {0: tensors}, "step": 20}),
        BytesFile(path="checkpoint-20/deep/state.json", content=lambda: b"{}"),
    ]
    manifest = Manifest(
        run="run",
        name=B,
        epoch=0.5,
        useful_s=2.0,
        created=2.0,
        framework="testing",
        native="checkpoint-20",
        files=(),
    )
    snapshot = snapshotter.take(files)
    snapshot.ready.result()
    killer.install()
    writer.submit(snapshot, manifest, results.append)
    writer.wait()
    return results[0]


def main(template: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    nth, operation = 0, ""
    while True:
        nth += 1
        for when in MOMENTS:
            if when == "midway" and not operation.startswith("os.write("):
                continue  # only a write has a middle
            target = folder / f"{nth}-{when}"
            shutil.copytree(template, target)
            status = _in_a_fork(target, nth, when)
            is_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            operation = (target / "died-at").read_text()
            point = {"operation": operation, "when": when, "folder": str(target), "is_killed": is_killed}
            print(json.dumps({**point, "status": status}), flush=True)
            if not is_killed:
                return


def _in_a_fork(target: Path, nth: int, when: str) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if commit_b(target, Killer(nth, when, target / "died-at")).error is None else 2
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
