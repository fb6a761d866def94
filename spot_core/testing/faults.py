"""Tiers that fail on demand: an outage, a lost reply, a torn upload, or the death of the process at one operation.

A schedule of failures is data: a `FaultPlan` of `Fault`s, shared by the tiers it covers, which counts operations over
all of them and remembers what it did, so that a test can assert that its faults fired.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from spot_core.errors import TierError
from spot_core.store.manifest import FileRecord
from spot_core.store.posix import PosixTier
from spot_core.store.tier import OnBytes, Tier

When = Literal["before", "midway", "after"]
MOMENTS: tuple[When, ...] = ("before", "midway", "after")

_T = TypeVar("_T")


def injected() -> TierError:
    """The error of a fault that names no other."""
    return TierError("injected fault")


class SimulatedCrash(BaseException):
    """The process died here. No `except Exception` may survive it, and no later operation reaches a tier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Which operations fail, and when.

    tier, operation: only those of this name, any if empty. path: only paths that start so. first, count: the first
    match that fails, from 1, and how many in a row do (None: all that follow). when: before anything was done,
    midway (half of an upload, one file of a deleted folder), or after it was done: the reply was lost.
    """

    tier: str = ""
    operation: str = ""
    path: str = ""
    first: int = 1
    count: int | None = 1
    when: When = "before"
    error: Callable[[], BaseException] = injected

    def covers(self, tier: str, operation: str, path: str) -> bool:
        return self.tier in {"", tier} and self.operation in {"", operation} and path.startswith(self.path)


class FaultPlan:
    """Counts the operations of the tiers that share it and picks those that fail. Threads may share it.

    faults: as given. operations: everything asked for, as `remote.create manifests/…`; fired: those of it that failed.
    """

    def __init__(self, *faults: Fault) -> None:
        self._lock = threading.Lock()
        self._seen = dict.fromkeys(faults, 0)
        self._is_crashed = False
        self.faults = faults
        self.operations: list[str] = []
        self.fired: list[str] = []

    @classmethod
    def crash_at(cls, nth: int, when: When) -> FaultPlan:
        """The process dies at the nth operation of all."""
        return cls(Fault(first=nth, when=when, error=SimulatedCrash))

    def add(self, *faults: Fault) -> None:
        """From now on these fail as well; what they count begins here."""
        with self._lock:
            self._seen.update(dict.fromkeys(faults, 0))

    def repair(self) -> None:
        """From now on nothing fails."""
        with self._lock:
            self._seen.clear()

    def choose(self, tier: str, operation: str, path: str) -> Fault | None:
        """Count an operation that is about to begin; returns the fault that hits it."""
        with self._lock:
            if self._is_crashed:
                raise SimulatedCrash
            line = f"{tier}.{operation} {path}"
            self.operations.append(line)
            hit: Fault | None = None
            for fault in self._seen:
                if fault.covers(tier, operation, path):
                    self._seen[fault] += 1
                    is_in_time = fault.count is None or self._seen[fault] < fault.first + fault.count
                    if hit is None and fault.first <= self._seen[fault] and is_in_time:
                        hit = fault
            if hit is not None:
                self.fired.append(f"{hit.when} {line}")
                self._is_crashed = hit.error is SimulatedCrash
            return hit

    def run(
        self, tier: str, operation: str, path: str, action: Callable[[], _T], midway: Callable[[], None] | None = None
    ) -> _T:
        """Do `action`, unless a fault says otherwise. midway: does half of it."""
        fault = self.choose(tier, operation, path)
        if fault is None:
            return action()
        if fault.when == "after":
            action()
        elif fault.when == "midway" and midway is not None:
            midway()
        raise fault.error()


class FaultyTier:
    """Any tier, with the faults of a plan. name: what the plan's faults call this tier."""

    def __init__(self, inner: Tier, plan: FaultPlan, *, name: str = "remote") -> None:
        self._inner, self._plan, self._name = inner, plan, name
        self.url, self.signing = inner.url, inner.signing

    def list(self, folder: str, *, after: str = "", most: int | None = None) -> list[str]:
        return self._plan.run(self._name, "list", folder, lambda: self._inner.list(folder, after=after, most=most))

    def read(self, path: str) -> bytes:
        return self._plan.run(self._name, "read", path, lambda: self._inner.read(path))

    def create(self, path: str, data: bytes) -> None:
        self._plan.run(self._name, "create", path, lambda: self._inner.create(path, data))

    def replace(self, path: str, data: bytes) -> None:
        self._plan.run(self._name, "replace", path, lambda: self._inner.replace(path, data))

    def upload(self, source: Path, path: str, on_bytes: OnBytes) -> FileRecord | None:
        return self._plan.run(
            self._name,
            "upload",
            path,
            lambda: self._inner.upload(source, path, on_bytes),
            lambda: _upload_half(self._inner, source, path),
        )

    def download(self, path: str, target: Path, on_bytes: OnBytes, *, size: int | None = None) -> FileRecord:
        action = partial(self._inner.download, path, target, on_bytes, size=size)
        return self._plan.run(self._name, "download", path, action)

    def size(self, path: str) -> int:
        return self._plan.run(self._name, "size", path, lambda: self._inner.size(path))

    def record(self, path: str) -> FileRecord:
        return self._plan.run(self._name, "record", path, lambda: self._inner.record(path))

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            _delete(self._inner, path, self._plan, self._name)


class FaultyPosixTier(PosixTier):
    """A local tier with the faults of a plan; what a commit does inside counts as well."""

    def __init__(self, root: str | Path, plan: FaultPlan, *, name: str = "local") -> None:
        super().__init__(root)
        self._plan, self._name = plan, name

    def list(self, folder: str, *, after: str = "", most: int | None = None) -> list[str]:
        action = partial(PosixTier.list, self, folder, after=after, most=most)
        return self._plan.run(self._name, "list", folder, action)

    def read(self, path: str) -> bytes:
        return self._plan.run(self._name, "read", path, lambda: PosixTier.read(self, path))

    def create(self, path: str, data: bytes) -> None:
        self._plan.run(self._name, "create", path, lambda: PosixTier.create(self, path, data))

    def record(self, path: str) -> FileRecord:
        return self._plan.run(self._name, "record", path, lambda: PosixTier.record(self, path))

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            _delete(PosixTier(self.root), path, self._plan, self._name)


def _delete(inner: Tier, path: str, plan: FaultPlan, name: str) -> None:
    plan.run(name, "delete", path, lambda: inner.delete([path]), lambda: _delete_one_entry(inner, path))


def _upload_half(inner: Tier, source: Path, path: str) -> None:
    data = source.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        half = Path(folder) / "half"
        half.write_bytes(data[: len(data) // 2])
        inner.upload(half, path, lambda _: None)


def _delete_one_entry(inner: Tier, path: str) -> None:
    try:
        entries = inner.list(path)
    except TierError:
        return  # a file: there is no middle
    inner.delete([f"{path}/{entry}" for entry in entries[:1]])
