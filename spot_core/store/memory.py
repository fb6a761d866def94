"""How much memory this process may still use: what the machine has, or what its control groups leave of it.

A container's limit is not in /proc/meminfo, and files in /dev/shm count towards it: who trusts the machine's figures
there is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import psutil

_M_MMAP_THRESHOLD = -3  # of malloc.h
_CGROUPS = Path("/sys/fs/cgroup")
# Version 2 and 1: limit, usage, and in memory.stat what the kernel gives back by itself.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def give_back_at_once() -> None:
    """Have glibc's allocator give parts of files back to the system when they are freed.

    By default each thread's arena keeps them, several hundred MB in all. Other allocators are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def available_bytes() -> int:
    """Memory that can be taken without swapping and without reaching a limit."""
    left = [max(0, limit - used) for limit, used in _limits()]
    return int(min([psutil.virtual_memory().available, *left]))


def total_bytes() -> int:
    """All memory there is for this process, taken or not."""
    return int(min([psutil.virtual_memory().total, *(limit for limit, _ in _limits())]))


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and usage of each control group that this process is in and that has a limit."""
    for folder in _groups():
        for limit, usage, reclaimable in _FILES:
            try:
                yield int((folder / limit).read_text()), _used_bytes(folder, usage, reclaimable)
            except (OSError, ValueError):
                continue  # no such version, or "max"


def _used_bytes(folder: Path, usage: str, reclaimable: str) -> int:
    statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int((folder / usage).read_text()) - int(statistics.get(reclaimable, 0))


def _groups() -> Iterator[Path]:
    """Folders of this process's memory groups, with those above them."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _CGROUPS / "memory" if controllers else _CGROUPS
        below = root / path.lstrip("/")
        # In a container the path may be the host's, and its own group is mounted at the root.
        yield from {root, *(folder for folder in (below, *below.parents) if folder.is_relative_to(root))}
