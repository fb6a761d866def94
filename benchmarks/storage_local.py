"""Local commits of `storage.py`: this project's writer beside the bytes alone and the trainers' own formats.

Everything durable: each file is fsynced, renamed into place and the folder fsynced.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from stall_states import SHAPES, make_model, manifest_of
from storage_report import Result, take_turns

from spot_core.snapshot.capture import Snapshotter
from spot_core.snapshot.files import NativeFile, SafetensorsFile, TorchFile
from spot_core.snapshot.writer import CheckpointWriter, Written
from spot_core.store import layout
from spot_core.store.manifest import Manifest
from spot_core.store.posix import PosixTier, fsync_folder

OURS = "CheckpointWriter"
_BLOCK_BYTES = 8 << 20
_WRITE_BACK = 2  # SYNC_FILE_RANGE_WRITE

Tensors = dict[str, torch.Tensor]


class Committer:
    """This project's writer with a checkpoint of one size: trained parameters and Adam's state, random."""

    def __init__(self, size: str, tier: PosixTier) -> None:
        named = make_model(SHAPES[size]).named_parameters()
        self.model: Tensors = {name: each.detach() for name, each in named if each.requires_grad}
        self.tier = tier
        self._snapshotter = Snapshotter(torch.device("cpu"))
        self._writer = CheckpointWriter(tier, self._snapshotter, number=1)
        self._files: list[NativeFile] = [
            SafetensorsFile(path="checkpoint/model.safetensors", tensors=self.model),
            TorchFile(path="checkpoint/optimizer.pt", tree=self.optimizer()),
        ]
        self._step = 0

    def optimizer(self) -> dict[str, Any]:
        """The shape of `Adam.state_dict()`."""
        state = {
            number: {"step": torch.tensor(1.0), "exp_avg": torch.randn_like(each), "exp_avg_sq": torch.rand_like(each)}
            for number, each in enumerate(self.model.values())
        }
        return {"state": state, "param_groups": [{"lr": 1e-4, "params": list(state)}]}

    def commit(self) -> tuple[Manifest, float]:
        """Commit the next checkpoint; returns its manifest and the seconds it took, the tensors being on the host."""
        self._step += 1
        snapshot = self._snapshotter.take(self._files)
        snapshot.ready.result()
        done: list[Written] = []
        began = time.perf_counter()
        self._writer.submit(snapshot, manifest_of(self._step), done.append)
        self._writer.wait()
        seconds = time.perf_counter() - began
        if done[0].error is not None:
            raise done[0].error
        return done[0].manifest, seconds

    def close(self) -> None:
        self._writer.close()
        self._snapshotter.close()


def measure(size: str, folder: Path, *, repeat: int) -> Result:
    """Commits to a PosixTier, beside other ways to get the same state onto the same disk."""
    committer = Committer(size, PosixTier(folder / "run"))
    # The first commit of a life is read back, which is not what is measured.
    manifest, _ = committer.commit()
    place = committer.tier.path(layout.checkpoint(manifest.name))
    content = {Path(file.path).name: (place / file.path).read_bytes() for file in manifest.files}
    optimizer = committer.optimizer()
    state = {f"{key}.{number}": each for number, one in optimizer["state"].items() for key, each in one.items()}

    def ours() -> float:
        manifest, seconds = committer.commit()
        committer.tier.delete([layout.manifest(manifest.name), layout.checkpoint(manifest.name)])
        return seconds

    def durably(write: Callable[[Path], None]) -> Callable[[], float]:
        return lambda: _seconds_durably(folder, write)

    ways = {
        OURS: ours,
        "os.write, fsync": durably(lambda to: _write_raw(to, content, is_early=False)),
        "torch.save, fsync": durably(lambda to: torch.save([committer.model, optimizer], to / "state.pt")),
        "safetensors.save_file, fsync": durably(
            lambda to: save_file({**committer.model, **state}, to / "state.safetensors")
        ),
    }
    if hasattr(ctypes.CDLL(None), "sync_file_range"):
        ways["os.write, sync_file_range, fsync"] = durably(lambda to: _write_raw(to, content, is_early=True))
    rows = take_turns(ways, repeat=repeat)
    committer.close()
    shutil.rmtree(folder)
    return Result("local commit", size, manifest.total_bytes, len(content), repeat, OURS, rows)


def _seconds_durably(folder: Path, write: Callable[[Path], None]) -> float:
    """Seconds until what `write` puts into a folder is durable and renamed."""
    staged, final = folder / "staged", folder / "final"
    staged.mkdir()
    began = time.perf_counter()
    write(staged)
    for path in staged.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    fsync_folder(staged)
    staged.rename(final)
    fsync_folder(folder)
    seconds = time.perf_counter() - began
    shutil.rmtree(final)
    return seconds


def _write_raw(folder: Path, content: Mapping[str, bytes], *, is_early: bool) -> None:
    """The bytes alone. is_early: have them written back meanwhile: the limit of the disk."""
    libc = ctypes.CDLL(None)
    for name, data in content.items():
        view = memoryview(data)
        with open(folder / name, "xb", buffering=0) as file:
            for start in range(0, len(view), _BLOCK_BYTES):
                end = start + file.write(view[start : start + _BLOCK_BYTES])
                assert end == min(len(view), start + _BLOCK_BYTES)
                if is_early:
                    begin, count = ctypes.c_int64(start), ctypes.c_int64(end - start)
                    libc.sync_file_range(file.fileno(), begin, count, _WRITE_BACK)
            os.fsync(file.fileno())
