"""The local tier: whether it can be written, is local, has room, and how fast it takes a checkpoint.

Everything is written below one new folder, which goes in the end, as do the folders that had to be made for it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from spot_core.config import SpotConfig
from spot_core.errors import ConfigError
from spot_core.report.checks.finding import Area, Finding
from spot_core.report.units import duration, size
from spot_core.store.posix import check_usable, fsync_folder, held_bytes, write_all
from spot_core.store.volume import describe_place, file_system, needed_bytes

AREA = Area("local tier")

PROBE = "doctor-"
# The newest ones that are kept, and the one that is being written.
_CHECKPOINTS = 3
_BLOCK_BYTES = 8 << 20
_IN_MEMORY = {"tmpfs", "ramfs"}
_ANOTHER_DISK = "set local= (SPOT_LOCAL) to a disk of this instance"


@dataclass(slots=True)
class LocalProbe:
    """What was found. sample: a file like a checkpoint's, None if it could not be written; write_s: what that took."""

    findings: list[Finding] = field(default_factory=list)
    sample: Path | None = None
    write_s: float | None = None


@contextlib.contextmanager
def local_probe(
    config: SpotConfig, *, remote: str, state_bytes: int, sample_bytes: int, is_chosen: bool
) -> Iterator[LocalProbe]:
    """Check the folder of the run; the sample is there until the block ends.

    remote: its URL. state_bytes: of a checkpoint. is_chosen: whether the user named the folder.
    """
    probe, folder = LocalProbe(), config.run_folder
    is_new = not folder.exists()
    with no_new_folders(folder):
        scratch = folder / f"{PROBE}{uuid.uuid4().hex[:12]}"
        try:
            try:
                check_usable(folder, 0)
                scratch.mkdir()
            except (ConfigError, OSError) as error:
                probe.findings.append(AREA.problem("folder", str(error), _ANOTHER_DISK))
            else:
                probe.findings.append(_folder(folder, is_new=is_new, is_chosen=is_chosen))
                probe.findings.extend(_place(folder, remote))
                probe.findings.append(_room(folder, state_bytes))
                _write(probe, scratch / "sample.bin", sample_bytes, state_bytes)
            yield probe
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def no_new_folders(folder: Path) -> Iterator[None]:
    """Of `folder` and those above it, the ones that the block makes are removed again, while they are empty."""
    missing = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    try:
        yield
    finally:
        for place in missing:
            with contextlib.suppress(OSError):
                place.rmdir()  # one that a run has begun to use meanwhile is not empty, and stays


def _folder(folder: Path, *, is_new: bool, is_chosen: bool) -> Finding:
    state = "can be made" if is_new else "can be written"
    guess = "" if is_chosen else ". A training would put it into its own output folder: SPOT_LOCAL names another"
    return AREA.ok("folder", f"{folder} {state}{guess}")


def _place(folder: Path, remote: str) -> Iterator[Finding]:
    kind = file_system(folder)
    remarks = [sentence for _, sentence in describe_place(folder, remote)]
    for sentence in remarks:
        yield AREA.warning("file system", *_with_fix(sentence))
    if kind in _IN_MEMORY:
        yield AREA.warning(
            "file system",
            f"{folder} is in memory ({kind}): checkpoints take the memory of the training",
            _ANOTHER_DISK,
        )
    elif not remarks:
        yield AREA.ok("file system", kind or "unknown")


def _with_fix(sentence: str) -> tuple[str, str]:
    detail, _, fix = sentence.partition(". Set ")
    return detail, f"set {fix}" if fix else _ANOTHER_DISK


def _room(folder: Path, state_bytes: int) -> Finding:
    usage, one_bytes = shutil.disk_usage(folder), needed_bytes(state_bytes)
    if not usage.total:
        return AREA.skipped("room", "the file system does not tell")
    free_bytes = usage.free
    room_bytes = free_bytes + held_bytes(folder)
    needed = f"{size(free_bytes)} free, {_CHECKPOINTS} checkpoints of {size(state_bytes)} are on it at a time"
    if room_bytes >= _CHECKPOINTS * one_bytes:
        return AREA.ok("room", needed, free_bytes=free_bytes)
    fix = f"free {size(_CHECKPOINTS * one_bytes - room_bytes)}, or set SPOT_LOCAL to a larger disk of this instance"
    make = AREA.warning if room_bytes >= one_bytes else AREA.problem
    return make("room", needed, fix, free_bytes=free_bytes)


def _write(probe: LocalProbe, file: Path, count: int, state_bytes: int) -> None:
    usage = shutil.disk_usage(file.parent)
    if usage.total and usage.free < count + needed_bytes(state_bytes):
        # A run in use must find room for its next checkpoint meanwhile.
        probe.findings.append(AREA.skipped("writing", "too little room to try it beside a run"))
        return
    block, began = os.urandom(_BLOCK_BYTES), time.perf_counter()
    try:
        with open(file, "xb", buffering=0) as opened:
            for start in range(0, count, len(block)):
                write_all(opened.fileno(), block[: count - start])
            os.fsync(opened.fileno())
        fsync_folder(file.parent)
    except OSError as error:
        fix = "free space there, or set SPOT_LOCAL to another disk of this instance"
        detail = f"a file of {size(count)} cannot be written: {error.strerror or error}"
        probe.findings.append(AREA.problem("writing", detail, fix))
        return
    probe.sample, probe.write_s = file, time.perf_counter() - began
    speed = count / max(probe.write_s, 1e-9)
    probe.findings.append(
        AREA.ok(
            "writing",
            f"{size(count)} written and fsynced in {duration(probe.write_s)}: {size(speed)}/s",
            write_bytes_per_s=round(speed),
        )
    )
