"""What every test job has: the common part of its spec, the places where it can be made to die, its log of batches.

A job is a module with a `JobSpec`, which extends `LifeSpec`, and `run(spec)`, which is what a user's script would do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import Self


@dataclass(frozen=True)
class LifeSpec:
    """What to train. folder: output, tiers and logs go there. dies: a place such as `step:7`, see `Killer` in a job."""

    folder: str
    has_callback: bool = True
    interval_s: float | None = 0.001  # a checkpoint at every boundary where the writer is free
    dies: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # for the SpotCallback
    seed: int = 7
    has_digests: bool = False  # of the state after every step, see `states`
    environ: dict[str, str] = dataclasses.field(default_factory=dict)  # of this life's process
    ranks: int = 1  # processes that train together
    dying_rank: int | None = None  # which of them dies, all if None
    is_apart: bool = False  # each has a memory of its own, as on another machine

    preloaded: ClassVar[tuple[str, ...]] = ()  # modules that `run` imports late, to be imported once for all lives

    @property
    def environment(self) -> dict[str, str]:
        """What the process that runs it needs; PYTHONPATH goes before the repository."""
        return {}

    def of_rank(self, rank: int) -> Self:
        """What that rank is told: where to die, if it is one that does."""
        return self if self.dying_rank in {None, rank} else dataclasses.replace(self, dies=None)

    @property
    def own_folder(self) -> Path:
        """Where this process logs: the ranks after the first one have their own."""
        return Path(self.folder_of(this_rank()))

    def folder_of(self, rank: int) -> str:
        """Where that rank logs."""
        return f"{self.folder}/rank-{rank}" if rank else self.folder

    @property
    def spot_options(self) -> dict[str, Any]:
        """Keyword arguments of the SpotCallback."""
        return {
            "remote": f"{self.folder}/remote/job",
            "local": f"{self.folder}/local",
            "interval_s": self.interval_s,
            "keep_remote": 3,
            **self.options,
        }


def this_rank() -> int:
    """Of this process, by torchrun's or Lightning's variable."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0")


class Place:
    """Where a life ends: `step:7` is kind step, number 7."""

    def __init__(self, where: str | None) -> None:
        self.kind, _, number = (where or "never:0").partition(":")
        self.number = int(number)

    def hang_if(self, kind: str, is_now: bool) -> None:
        """For a minute, telling so in the log."""
        if is_now and self.kind == kind:
            self.kind = "never"
            print(f"hanging at {kind}", flush=True)
            time.sleep(60.0)

    def die_if(self, kind: str, is_now: bool) -> None:
        """By a real SIGKILL."""
        if is_now and self.kind == kind:
            os.kill(os.getpid(), signal.SIGKILL)


def die_at_operation(number: int, record: Path, signum: signal.Signals = signal.SIGKILL) -> None:
    """From now on count what the process does to files; at the given one, be sent a signal before it happens.

    The count at each link, which is where a manifest appears, goes to `record`.
    """
    count = 0

    def counted(original: Any, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signum)
            if name == "link":
                with open(record, "a") as file:
                    file.write(f"{count}\n")
            return original(*args, **kwargs)

        return call

    for name in ("write", "fsync", "replace", "link", "mkdir", "unlink"):
        setattr(os, name, counted(getattr(os, name), name))


class SeenLog:
    """Appends what each training forward was fed to `seen.jsonl`."""

    def __init__(self, folder: Path) -> None:
        self._file = open(folder / "seen.jsonl", "a", buffering=1)

    def __deepcopy__(self, memo: dict[int, Any]) -> SeenLog:
        return self  # copies of a model, such as an average of weights, log to the same file

    def add(self, step: int, ids: Any, checksum: int) -> None:
        time.sleep(0.02)  # slow enough for commits to land between kills
        self._file.write(json.dumps([os.getpid(), step, ids, checksum]) + "\n")


def digest_of(weights: Iterable[torch.Tensor], optimizer: dict[str, Any]) -> str:
    """One digest of all their bytes, whatever they are called and in whatever order they come."""
    tensors = (*weights, *tensors_of_state(optimizer).values())
    each = (hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest() for tensor in tensors)
    return hashlib.sha256("".join(sorted(each)).encode()).hexdigest()


class StateLog:
    """Appends a digest of what a checkpoint must hold to `states.jsonl`."""

    def __init__(self, folder: Path) -> None:
        self._file = open(folder / "states.jsonl", "a", buffering=1)

    def add(self, step: int, weights: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
        digest = digest_of(weights, optimizer.state_dict())
        self._file.write(json.dumps([step, digest]) + "\n")


def states(spec: LifeSpec) -> dict[int, str]:
    """Step -> digest of the state after it, of a life with `has_digests`."""
    return dict(json.loads(line) for line in Path(spec.folder, "states.jsonl").read_text().splitlines())


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str = "optimizer") -> dict[str, torch.Tensor]:
    """The tensors of its state by name."""
    return tensors_of_state(optimizer.state_dict(), prefix)


def tensors_of_state(state_dict: dict[str, Any], prefix: str = "optimizer") -> dict[str, torch.Tensor]:
    """The same of what `state_dict` gave."""
    return {
        f"{prefix}.{i}.{key}": value
        for i, state in state_dict["state"].items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }
