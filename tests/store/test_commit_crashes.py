"""A trainer killed with SIGKILL at any file operation of a commit: the old checkpoint or the new one, never less."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from spot_core.agent.drain import Drain
from spot_core.store import catalog, incarnation, layout, resume, retention
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.testing.checkpoints import commit_checkpoint
from spot_core.testing.invariants import assert_run_invariants
from tests.store.commit_crashes import MOMENTS, A, B

C = CheckpointName(2, 5)


@dataclass(frozen=True)
class CrashPoint:
    """Where the process died, empty if it did not, and what it left."""

    operation: str
    when: str
    folder: Path
    status: int


def crash_everywhere(template: Path, folder: Path) -> list[CrashPoint]:
    result = subprocess.run(
        [sys.executable, "-m", "tests.store.commit_crashes", str(template), str(folder)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        timeout=200,
        check=True,
        text=True,
    )
    points = []
    for line in result.stdout.splitlines():
        point = json.loads(line)
        assert point["is_killed"] == bool(point["operation"]), point
        points.append(CrashPoint(point["operation"], point["when"], Path(point["folder"]), point["status"]))
    return points


@pytest.mark.parametrize("has_older", [True, False], ids=["after an older checkpoint", "the first of the run"])
def test_a_kill_at_any_file_operation_leaves_the_old_checkpoint_or_the_new_one(
    memory_path: Path, has_older: bool
) -> None:
    template = memory_path / "template"
    local, remote = PosixTier(template / "local"), PosixTier(template / "remote")
    incarnation.claim(local, remote, 0.0)
    if has_older:
        commit_checkpoint(local, A)

    *killed, finished = crash_everywhere(template, memory_path / "points")
    assert finished.operation == "" and finished.status == 0, "the commit that was left alone must succeed"
    assert len(killed) > 60
    assert {point.when for point in killed} == set(MOMENTS)
    for part in ("os.write(", "os.fsync(", "os.replace(", "os.link(", "os.mkdir(", "os.unlink(", "open("):
        assert any(point.operation.startswith(part) for point in killed), f"nothing died at {part}"
    whole = catalog.read_manifest(PosixTier(finished.folder / "local"), B).files

    outcomes = set()
    for point in [*killed, finished]:
        outcomes.add(_judge(point, A if has_older else None, whole))
        shutil.rmtree(point.folder)
    assert outcomes == {B, A if has_older else None}


def _judge(point: CrashPoint, older: CheckpointName | None, whole: object) -> CheckpointName | None:
    local, remote = PosixTier(point.folder / "local"), PosixTier(point.folder / "remote")
    is_committed = local.path(layout.manifest(B)).exists()
    assert_run_invariants(local, remote)

    restored = resume.newest_valid(local, remote, lambda *_: None)
    chosen = restored.manifest.name if restored else None
    assert chosen == (B if is_committed else older), point
    if is_committed:
        assert catalog.read_manifest(local, B).files == whole, point

    number = incarnation.claim(local, remote, 0.0)
    retention.sweep_orphans(local, catalog.names(local), before_incarnation=number)
    assert local.list(layout.STAGING) == []
    assert local.list(layout.CHECKPOINTS) == sorted(str(name) for name in (older, B if is_committed else None) if name)
    commit_checkpoint(local, C)
    again = resume.newest_valid(local, remote, lambda *_: None)
    assert again is not None and again.manifest.name == C

    drain = Drain(local, remote, incarnation=number, keep_local=1, keep_remote=3)
    while drain.step(lambda *_: None) is not None:
        assert_run_invariants(local, remote, durable=C)
    assert catalog.names(local) == [C]
    return chosen
