"""A process that dies at any point of a drain, a prune, a claim, a resume, a restore or a repair costs nothing.

Twice: killed with SIGKILL at each change of a file, on two folders; and stopped at each operation of a tier, on a
folder and a real S3 server. Afterwards the invariants hold, a resume finds what it must, the action can be done again,
and some lives later nothing is left of the one that died. (`tests/store/test_commit_crashes.py` does so for a save.)
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from spot_core.report import verify
from spot_core.report.places import StoredRun
from spot_core.store import catalog, layout
from spot_core.store.identity import read_run
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.store.tier import Tier, open_tier
from spot_core.testing.checkpoints import commit_checkpoint, content_of
from spot_core.testing.faults import MOMENTS, FaultPlan, FaultyPosixTier, FaultyTier, SimulatedCrash
from spot_core.testing.invariants import assert_resumes, assert_run_invariants, assert_swept
from tests.durability.crash_points import (
    ACTIONS,
    drain,
    mark_complete,
    prune_by_hand,
    repair_local,
    repair_remote,
    restore_elsewhere,
    start_life,
)
from tests.durability.scale import IS_DEEP, times
from tests.servers import S3Server

ONE, TWO, THREE, FOUR = (CheckpointName(1, step) for step in (10, 20, 30, 40))
FILE = "checkpoint-40/model.bin"

Tally = Callable[[str, object], None]
pytestmark = [pytest.mark.timeout(3_600), pytest.mark.usefixtures("without_waiting")]


@pytest.fixture
def tally(record_property: Tally) -> Tally:
    """Writes down how often something was tried, for `--junitxml`."""
    return record_property


# -- what each action is done to -------------------------------------------------------------------------------


def nothing_yet(local: PosixTier, remote: Tier) -> None:
    """The first life of a run is about to begin."""


def a_backlog(local: PosixTier, remote: Tier) -> None:
    """One durable checkpoint, three that wait: the last pins the second, and training ended there."""
    start_life(local, remote)
    commit_checkpoint(local, ONE)
    drain(local, remote)
    for name, pins in ((TWO, None), (THREE, None), (FOUR, TWO)):
        commit_checkpoint(local, name, pins=pins)
    catalog.mark_complete(local, FOUR, 40)


def much_to_prune(local: PosixTier, remote: Tier) -> None:
    """Four checkpoints on both tiers, of which the last pins the second; training also ended at the third."""
    start_life(local, remote)
    for name, pins in ((ONE, None), (TWO, None), (THREE, None), (FOUR, TWO)):
        commit_checkpoint(local, name, pins=pins)
        _copy(local, remote, name)
    for tier in (local, remote):
        catalog.mark_complete(tier, THREE, 30)


def a_damaged_local_copy(local: PosixTier, remote: Tier) -> None:
    """What a resume sets aside, downloads again and sweeps."""
    much_to_prune(local, remote)
    local.path(f"{layout.checkpoint(FOUR)}/{FILE}").write_bytes(b"damaged")
    for name in (CheckpointName(1, 50), CheckpointName(1, 60)):
        commit_checkpoint(local, name)
        local.delete([layout.manifest(name)])


def damage_on(is_remote: bool) -> Callable[[PosixTier, Tier], None]:
    """A flipped file and a missing one, a manifest that is gone bad, all whole on the other tier."""

    def damaged(local: PosixTier, remote: Tier) -> None:
        much_to_prune(local, remote)
        tier = remote if is_remote else local
        tier.replace(f"{layout.checkpoint(FOUR)}/{FILE}", b"damaged")
        tier.delete([f"{layout.checkpoint(TWO)}/checkpoint-20/state/rng.bin"])
        tier.replace(layout.manifest(THREE), b"{}")

    return damaged


def an_unmarked_end(local: PosixTier, remote: Tier) -> None:
    start_life(local, remote)
    commit_checkpoint(local, FOUR)


def _copy(local: PosixTier, remote: Tier, name: CheckpointName) -> None:
    for path in content_of(name):
        remote.upload(
            local.path(f"{layout.checkpoint(name)}/{path}"), f"{layout.checkpoint(name)}/{path}", lambda _: None
        )
    remote.create(layout.manifest(name), local.read(layout.manifest(name)))


# -- what must be true afterwards ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An action and what it is done to. newest: what a resume must find whenever the process dies.

    is_damaged: some copies are damaged from the start; repair or resume alone mend them.
    """

    action: Callable[[PosixTier, Tier], object]
    prepare: Callable[[PosixTier, Tier], None]
    newest: CheckpointName | None = FOUR
    is_damaged: bool = False


CASES = {
    "the first claim": Case(start_life, nothing_yet, newest=None),
    "resume": Case(start_life, a_damaged_local_copy, is_damaged=True),
    "drain": Case(drain, a_backlog),
    "spot prune": Case(prune_by_hand, much_to_prune),
    "spot repair of the remote": Case(repair_remote, damage_on(is_remote=True), is_damaged=True),
    "spot repair of the local folder": Case(repair_local, damage_on(is_remote=False), is_damaged=True),
    "spot restore": Case(restore_elsewhere, much_to_prune),
    "the end of training": Case(mark_complete, an_unmarked_end),
}


def judge(case: Case, local: PosixTier, remote: Tier) -> None:
    """The process died there; look, do it again, and live on."""
    damaged = {(tier.url, name) for tier in (local, remote) for name in (TWO, THREE, FOUR) if case.is_damaged}
    assert_run_invariants(local, remote, damaged=damaged)
    if case.newest is None:
        start_life(local, remote)
        commit_checkpoint(local, CheckpointName(start_life(local, remote).incarnation or 0, 10))
    else:
        assert_resumes(local, remote, case.newest)
        is_restored = (local.root.parent / "restored" / "checkpoint-40").exists()
        if case.action is not start_life and not is_restored:
            case.action(local, remote)
        _check_result(case, local, remote)
    _live_on(local, remote)


def _check_result(case: Case, local: PosixTier, remote: Tier) -> None:
    """What the action was to achieve, it has achieved the second time."""
    if case.action is drain:
        assert set(catalog.names(remote)) >= {TWO, FOUR} and catalog.names(local)[0] == FOUR
        assert catalog.completions(remote)[FOUR] == 40
    elif case.action is prune_by_hand:
        assert catalog.names(remote) == [FOUR, TWO]
    elif case.action in (repair_remote, repair_local):
        tier = remote if case.action is repair_remote else local
        report = verify.verify_run(StoredRun(tier, read_run(tier) or {}), lambda *_: None)
        assert report.is_sound and len(report.checkpoints) == 4
    elif case.action is restore_elsewhere:
        restored = local.root.parent / "restored" / "checkpoint-40"
        contents = {path: content for path, content in content_of(FOUR).items() if path.startswith("checkpoint-40/")}
        assert {f"checkpoint-40/{path.relative_to(restored)}" for path in restored.rglob("*") if path.is_file()} == set(
            contents
        )
        assert all((restored.parent / path).read_bytes() == content for path, content in contents.items())
    elif case.action is mark_complete:
        assert catalog.completions(local) == {FOUR: 40}


def _live_on(local: PosixTier, remote: Tier) -> None:
    """More lives on this instance, also of a run that had ended: of the dead one, life 1 or 2, nothing is left."""
    for _ in range(3):
        opened = start_life(local, remote)
        if opened.incarnation is None:
            assert opened.restored is not None
            for tier in (local, remote):
                tier.delete([layout.completion(opened.restored.manifest.name)])
            opened = start_life(local, remote)
        number = opened.incarnation
        assert number is not None
        assert_swept(local, before_incarnation=number)
        assert_swept(remote, before_incarnation=number - 1)
        name = CheckpointName(number, 50)
        commit_checkpoint(local, name)
        drain(local, remote, number=number)
        assert_run_invariants(local, remote, durable=name)
        assert catalog.names(local) == [name] and catalog.names(remote)[0] == name
    left = [path for tier in (local, remote) if isinstance(tier, PosixTier) for path in tier.root.rglob(".tmp-*")]
    assert [path for path in left if not path.name.endswith(layout.RUN)] == []


# -- killed at each change of a file ---------------------------------------------------------------------------


@dataclass(frozen=True)
class CrashPoint:
    operation: str
    folder: Path


def crash_everywhere(action: str, template: Path, folder: Path, stride: int) -> Iterator[CrashPoint]:
    """Each state that a kill leaves, then the one that the action left alone leaves (operation is empty)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.durability.crash_points", action, str(template), str(folder), str(stride)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
    )
    assert process.stdout is not None
    with process:
        for line in process.stdout:
            point = json.loads(line)
            assert point["is_killed"] == bool(point["operation"]), point
            assert point["is_killed"] or point["status"] == 0, "the action that was left alone must succeed"
            yield CrashPoint(
                f"{point['when']} {point['operation']}" if point["operation"] else "", Path(point["folder"])
            )
    assert process.returncode == 0


@pytest.mark.parametrize("what", CASES)
def test_a_kill_at_any_change_of_a_file_costs_nothing(memory_path: Path, what: str, tally: Tally) -> None:
    case, template = CASES[what], memory_path / "template"
    template.mkdir()
    case.prepare(PosixTier(template / "local"), PosixTier(template / "remote"))
    name = next(name for name, action in ACTIONS.items() if action is case.action)
    killed = 0
    for point in crash_everywhere(name, template, memory_path / "points", times(3, 1)):
        try:
            judge(case, PosixTier(point.folder / "local"), PosixTier(point.folder / "remote"))
        except Exception as error:
            raise AssertionError(f"after a kill {point.operation}") from error
        killed += bool(point.operation)
        shutil.rmtree(point.folder)
    assert killed > 1, "it was never killed"
    tally("crash points", killed)


# -- stopped at each operation of a tier -----------------------------------------------------------------------


# What the first claim and the end of training do to a bucket is part of what the others do.
ON_S3 = list(CASES) if IS_DEEP else ["resume", "drain", "spot prune", "spot repair of the remote"]


@pytest.mark.parametrize("what", CASES)
def test_a_crash_at_any_operation_on_two_folders_costs_nothing(memory_path: Path, what: str, tally: Tally) -> None:
    for start in range(times(1, len(MOMENTS))):
        folder = memory_path / MOMENTS[start]
        folder.mkdir()
        turns = _crash_everywhere(CASES[what], folder, lambda point: PosixTier(point / "remote"), times(5, 1), start)
        tally("crash points", turns)


@pytest.mark.parametrize("what", ON_S3)
def test_a_crash_at_any_operation_on_s3_costs_nothing(
    memory_path: Path, s3_server: S3Server, what: str, tally: Tally
) -> None:
    """A crash is a crash with and without TLS: the faster server will do."""
    bucket = s3_server.new_bucket()
    turns = _crash_everywhere(
        CASES[what],
        memory_path,
        lambda point: open_tier(f"s3://{bucket}/{point.name}/run", s3_server.options),
        times(31, 2),
    )
    tally("crash points", turns)


def _crash_everywhere(case: Case, folder: Path, remote_of: Callable[[Path], Tier], stride: int, start: int = 0) -> int:
    """Crash before, midway or after every `stride`-th operation, in turn, until one attempt gets through.

    start: with which of the three it begins. Returns how often it crashed.
    """
    template = folder / "template"
    template.mkdir()
    case.prepare(PosixTier(template / "local"), PosixTier(template / "remote"))
    for turn, nth in enumerate(itertools.count(1, stride)):
        plan = FaultPlan.crash_at(nth, MOMENTS[(start + turn) % len(MOMENTS)])
        point = folder / str(nth)
        local, remote = PosixTier(point / "local"), remote_of(point)
        _clone(template, local, remote)
        with contextlib.suppress(SimulatedCrash):
            case.action(FaultyPosixTier(local.root, plan), FaultyTier(remote, plan))
        try:
            judge(case, local, remote)
        except Exception as error:
            raise AssertionError(f"after a crash {plan.fired}") from error
        shutil.rmtree(point)
        if not plan.fired:
            assert turn > 0
            return turn
    raise AssertionError("it never got through")


def _clone(template: Path, local: PosixTier, remote: Tier) -> None:
    if (template / "local").exists():
        shutil.copytree(template / "local", local.root)
    source = template / "remote"
    for file in source.rglob("*"):
        if file.is_file():
            remote.replace(str(file.relative_to(source)), file.read_bytes())
