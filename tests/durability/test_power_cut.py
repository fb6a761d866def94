"""The power goes at any moment, on real file systems: what was committed is there, whole, and the run goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.durability.power_cuts import FLAGS, Plan
from tests.durability.scale import times

KINDS = ("ext4", "xfs")
TIMEOUT_S = times(300, 1500)

pytestmark = pytest.mark.timeout(TIMEOUT_S + 60)


def why_not(kind: str) -> str | None:
    """Why the power of a disk with this file system cannot be cut here, None if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "mounting a disk needs Linux and root"
    for tool in (f"mkfs.{kind}", "unshare", "mount", "losetup"):
        if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            return f"{tool} is not installed"
    if not Path("/dev/loop-control").exists():
        return "there are no loop devices"
    modules = Path("/proc/filesystems").read_text().split()
    if kind not in modules and subprocess.run(["modprobe", kind], capture_output=True).returncode != 0:
        return f"this kernel has no {kind}"
    refused = subprocess.run(["unshare", "-m", "losetup", "-f"], capture_output=True, text=True)
    return refused.stderr.strip() or None if refused.returncode != 0 else None


def cut(plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """Each history with its cut and what was found after it, the one that was left alone first."""
    if reason := why_not(plan.kind):
        pytest.skip(reason)
    folder = folder / "disk"
    folder.mkdir()
    # The namespace takes the mounts, and so the loop devices, with it, however the process ends.
    result = subprocess.run(
        ["unshare", "-m", sys.executable, "-m", "tests.durability.power_cuts", json.dumps(asdict(plan)), str(folder)],
        capture_output=True,
        cwd=Path(__file__).parents[2],
        timeout=TIMEOUT_S,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    whole, *found = [json.loads(line) for line in result.stdout.splitlines()]
    # A history may be over before a moment that was chosen by the time the first one took.
    assert len(found) == plan.cuts and all(each["cut_at"] for each in found if each["nth"])
    assert whole["problem"] is None and len(whole["said"]) > 15, "the history that was left alone must succeed"
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_power_cut_at_any_moment_loses_nothing_that_was_promised(memory_path: Path, kind: str) -> None:
    """Commit, snapshot writer, claim, drain, completion, repair, set-aside, deletion, progress."""
    found = cut(Plan(kind, cuts=times(6, 300), flags=tuple(FLAGS)), memory_path)
    assert [each for each in found if each["problem"] is not None] == []
    assert {each["flag"] for each in found} == set(FLAGS)
    assert len({len(each["said"]) for each in found}) > 4, "the cuts must spread over the history"


@pytest.mark.parametrize("unsynced", ["files", "folders"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_fsync_is_found(memory_path: Path, kind: str, unsynced: str) -> None:
    found = cut(Plan(kind, cuts=times(16, 48), flags=("no flush",), unsynced=unsynced), memory_path)
    problems = [each["problem"] for each in found if each["problem"] is not None]
    assert problems, f"nothing was lost on {kind} although {unsynced} are not synced"
