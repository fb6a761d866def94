"""Disks that fill up for real, for tests."""

from __future__ import annotations

import contextlib
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory, mounted on `folder`; skips the test where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(file: Path, *, leave_bytes: int = 0) -> None:
    """Write `file` until the disk is full, then give back `leave_bytes`."""
    with open(file, "wb", buffering=0) as filler:
        with contextlib.suppress(OSError):
            while filler.write(b"x" * 1024):
                pass
        filler.truncate(filler.tell() - leave_bytes)


@contextlib.contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """In this process every write beyond that size fails in its middle, with EFBIG, as a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
