"""A run on a disk of its own whose power is cut, each time at another moment of the same history.

Run as a process of its own, in a mount namespace of its own, so that nothing stays mounted when it ends:
`unshare -m python -m tests.durability.power_cuts '{"kind": "ext4", …}' FOLDER`. It makes a file system in an image,
plays the history on copies of it in forks, and cuts the power by FS_IOC_GOINGDOWN: what the page cache and the log hold
and did not write yet is lost. Then it mounts the image again and judges. It prints one JSON line for each cut; the
first line is the history that was left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors  # noqa: F401  imported before the forks, like torch
import torch

from spot_core.agent.drain import Drain
from spot_core.agent.journal import Journal, Progress
from spot_core.errors import SpotError
from spot_core.report.places import StoredRun
from spot_core.report.repair import repair
from spot_core.snapshot.capture import Snapshotter
from spot_core.snapshot.files import BytesFile, SafetensorsFile, TorchFile
from spot_core.snapshot.writer import CheckpointWriter, Written
from spot_core.store import catalog, incarnation, layout, resume, retention
from spot_core.store.identity import RunIdentity, create_run, read_run
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.posix import PosixTier
from spot_core.testing.checkpoints import commit_checkpoint, path_in_checkpoint
from tests.store.commit_crashes import MOMENTS, Killer

GOING_DOWN = 0x8004587D
# What is still written when the power goes: everything, the log, or nothing.
FLAGS = {"flush": 0, "log flush": 1, "no flush": 2}
IMAGE_BYTES = {"ext4": 64 << 20, "xfs": 300 << 20}

OLD, OLDER = CheckpointName(1, 20), CheckpointName(1, 10)
SAVED, NEXT, LAST = CheckpointName(2, 30), CheckpointName(2, 40), CheckpointName(2, 50)
# Damaged before the history begins, which mends them.
DAMAGED = {("local", OLD), ("remote", OLDER)}

Acknowledge = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """kind: file system. cuts: how many. flags: of FLAGS, in turn. unsynced: whose fsync does nothing: `files`,
    `folders`, `all`, or `none`."""

    kind: str
    cuts: int
    flags: tuple[str, ...]
    unsynced: str = "none"


class Disk:
    """A file system in an image file, copied from a template before each history."""

    def __init__(self, kind: str, folder: Path) -> None:
        self._kind, self._image, self._template = kind, folder / "disk", folder / "template"
        self.mount = folder / "mount"
        self.mount.mkdir()
        with open(self._image, "wb") as image:
            image.truncate(IMAGE_BYTES[kind])
        _run(f"mkfs.{kind}", "-q", str(self._image))

    @contextlib.contextmanager
    def mounted(self) -> Iterator[Path]:
        _run("mount", "-t", self._kind, "-o", "loop", str(self._image), str(self.mount))
        try:
            yield self.mount
        finally:
            _run("umount", str(self.mount))

    def keep(self) -> None:
        """Make what the disk holds now the template."""
        self._image.rename(self._template)

    def restore(self) -> None:
        _run("cp", "--sparse=always", str(self._template), str(self._image))


def _run(*command: str) -> None:
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)


def cut_power(mount: int, flag: str) -> None:
    """mount: descriptor of a folder on the disk."""
    fcntl.ioctl(mount, GOING_DOWN, struct.pack("I", FLAGS[flag]))


class Switch(Killer):
    """Cuts the power of a disk at one file operation of this process, which dies as well."""

    def __init__(self, nth: int, when: str, note: Path, mount: Path, flag: str) -> None:
        super().__init__(nth, when, note)
        self._mount, self._flag = os.open(mount, os.O_RDONLY), flag

    def install(self) -> None:
        super().install()
        os.pwrite = self._counted("os.pwrite", os.pwrite)  # type: ignore[assignment]

    def end(self) -> None:
        cut_power(self._mount, self._flag)
        super().end()


# -- the history ---------------------------------------------------------------------------------------------------


def tiers(mount: Path) -> tuple[PosixTier, PosixTier]:
    return PosixTier(mount / "local" / "run"), PosixTier(mount / "remote" / "run")


def prepare(mount: Path) -> None:
    """A first life with two checkpoints, of which each tier has a damaged one."""
    local, remote = tiers(mount)
    create_run(local, remote, RunIdentity("testing", {}), 0.0)
    incarnation.claim(local, remote, 0.0)
    for name in (OLDER, OLD):
        for tier in (local, remote):
            commit_checkpoint(tier, name)
    for tier, name in ((local, OLD), (remote, OLDER)):
        tier.path(path_in_checkpoint(name, f"checkpoint-{name.step}/model.bin")).write_bytes(b"damaged")


def play(mount: Path, acknowledge: Acknowledge) -> None:
    """A second life. What it acknowledges was promised to be durable before."""
    local, remote = tiers(mount)
    resume.newest_valid(local, remote, lambda *_: None)
    acknowledge(f"mended local {OLD}")
    number = incarnation.claim(local, remote, 0.0)
    acknowledge(f"claimed {number}")
    journal = Journal(local.root, number)
    journal.open_progress(Progress(OLD.step, 20.0, OLD.step))
    runs = [StoredRun(tier, read_run(tier) or {}) for tier in (remote, local)]
    assert repair(runs[0], runs[1], now=0.0, on_progress=lambda *_: None).is_whole
    acknowledge(f"mended remote {OLDER}")

    _save(local, SAVED)
    acknowledge(f"committed local {SAVED}")
    journal.write_progress(Progress(SAVED.step, 30.0, OLD.step))
    commit_checkpoint(local, NEXT)
    acknowledge(f"committed local {NEXT}")
    drain = Drain(local, remote, incarnation=number, keep_local=9, keep_remote=9)
    while (drained := drain.step(lambda *_: None)) is not None:
        acknowledge(f"committed remote {drained[0]}")
    catalog.mark_complete(local, NEXT, NEXT.step)
    acknowledge(f"completed local {NEXT}")
    drain.step(lambda *_: None)
    acknowledge(f"completed remote {NEXT}")

    for label, tier, name in (("remote", remote, OLDER), ("local", local, OLDER), ("local", local, SAVED)):
        acknowledge(f"doomed {label} {name}")
        retention.delete_checkpoints(tier, [name])
        acknowledge(f"deleted {label} {name}")
    commit_checkpoint(local, LAST)
    acknowledge(f"committed local {LAST}")


def _save(local: PosixTier, name: CheckpointName) -> None:
    """One checkpoint of every kind of file, through the writer of a trainer."""
    snapshotter = Snapshotter(torch.device("cpu"))
    writer, results = CheckpointWriter(local, snapshotter, number=name.incarnation), list[Written]()
    tensors = {"a": torch.arange(6000.0).view(20, 300), "b": torch.arange(5, dtype=torch.int8)}
    native = f"checkpoint-{name.step}"
    files = [
        SafetensorsFile(path=f"{native}/model.safetensors", tensors=tensors),
        TorchFile(path=f"{native}/optimizer.pt", tree={"state": {0: tensors}, "step": name.step}),
        BytesFile(path=f"{native}/deep/state.json", content=lambda: b"{}"),
    ]
    manifest = Manifest(
        run="run", name=name, epoch=0.5, useful_s=2.0, created=2.0, framework="testing", native=native, files=()
    )
    writer.submit(snapshotter.take(files), manifest, results.append)
    writer.wait()
    if results[0].error is not None:
        raise results[0].error


# -- one cut -------------------------------------------------------------------------------------------------------


def play_in_a_fork(disk: Disk, plan: Plan, nth: int, when: str, flag: str, cut_after_s: float | None) -> list[str]:
    """Play until the power goes: at the nth operation, or after so many seconds. Returns what was acknowledged."""
    note = disk.mount.with_name("cut-at")
    said = disk.mount.with_name("said")
    for file in (note, said):
        file.write_bytes(b"")
    mount = os.open(disk.mount, os.O_RDONLY)
    pid = os.fork()
    if pid == 0:
        os.close(mount)
        code = 1
        try:
            code = _play_alone(disk.mount, plan, Switch(nth, when, note, disk.mount, flag), said)
        finally:
            os._exit(code)
    if cut_after_s is not None:
        time.sleep(cut_after_s)
        cut_power(mount, flag)
        os.kill(pid, signal.SIGKILL)
        note.write_text("a moment")
    os.waitpid(pid, 0)
    os.close(mount)
    return said.read_text().splitlines()


def _play_alone(mount: Path, plan: Plan, switch: Switch, said: Path) -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what fails after the cut is no news
    write, log = os.write, os.open(said, os.O_WRONLY | os.O_APPEND)
    _skip_fsync(plan.unsynced)
    switch.install()
    play(mount, lambda what: void(write(log, f"{what}\n".encode())))
    write(log, f"ended after {switch.count}\n".encode())
    return 0


def void(_: object) -> None:
    pass


def _skip_fsync(unsynced: str) -> None:
    fsync = os.fsync

    def some(descriptor: int) -> None:
        kind = "folders" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "files"
        if unsynced not in {"all", kind}:
            fsync(descriptor)

    os.fsync = some


# -- the judgement -------------------------------------------------------------------------------------------------


def judge(mount: Path, said: list[str]) -> None:
    """Raise AssertionError or what reading raises unless all that was acknowledged is there, and nothing is torn."""
    local, remote = tiers(mount)
    for label, tier in (("local", local), ("remote", remote)):
        present = catalog.names(tier)
        for name in present:
            problems = resume.damaged_files(tier, catalog.read_manifest(tier, name), lambda _: None)
            is_known = (label, name) in DAMAGED and f"mended {label} {name}" not in said
            assert not problems or is_known, f"{label} {name}: {problems}"
        for what in said:
            verb, *rest = what.split()
            if rest[0] != label:
                continue
            is_doomed = f"doomed {label} {rest[1]}" in said
            is_present = CheckpointName.parse(rest[1]) in present
            assert verb not in {"committed", "mended"} or is_doomed or is_present, f"{what}, and is gone"
            assert verb != "deleted" or not is_present, f"{what}, and is back"
            assert verb != "completed" or catalog.completions(tier) == {NEXT: NEXT.step}, f"{what}, and is not"
        for folder in (layout.INCARNATIONS, layout.MANIFESTS):
            for entry in tier.list(folder):
                assert json.loads(tier.read(f"{folder}/{entry}")), f"{label} {folder}/{entry} is torn"
        if "claimed 2" in said:
            assert incarnation.newest(tier) == 2, "the claim is gone"
        assert read_run(tier), f"{label} run.json is gone"
    Journal(local.root, 2).read_progress()


def go_on(mount: Path) -> None:
    """The next life resumes from the newest checkpoint there is, commits, drains, and sweeps."""
    local, remote = tiers(mount)
    newest = max([*catalog.names(local), *catalog.names(remote)])
    restored = resume.newest_valid(local, remote, lambda *_: None)
    assert restored is not None and restored.manifest.name == newest, f"resumed {restored}, the newest is {newest}"
    number = incarnation.claim(local, remote, 0.0)
    for tier in (local, remote):
        retention.sweep_orphans(tier, catalog.names(tier), before_incarnation=number)
    name = CheckpointName(number, 60)
    commit_checkpoint(local, name)
    drain = Drain(local, remote, incarnation=number, keep_local=1, keep_remote=1)
    while drain.step(lambda *_: None) is not None:
        pass
    for tier in (local, remote):
        assert catalog.names(tier) == [name]
        resume.verify(tier, catalog.read_manifest(tier, name))
        assert tier.list(layout.CHECKPOINTS) == [str(name)]


def main(plan: Plan, folder: Path) -> None:
    torch.set_num_threads(1)
    disk = Disk(plan.kind, folder)
    with disk.mounted() as mount:
        prepare(mount)
    disk.keep()
    draw, operations, seconds = random.Random(plan.kind), 0, 0.0
    for number in range(plan.cuts + 1):
        nth, when, flag, cut_after_s = 0, "", plan.flags[number % len(plan.flags)], None
        if number and number % 4 == 0:
            cut_after_s = draw.random() * seconds
        elif number:
            # One in each stretch of the history, so that few cuts cover all of it.
            nth, when = 1 + int((number - draw.random()) * operations / plan.cuts), draw.choice(MOMENTS)
        disk.restore()
        with disk.mounted():
            began = time.monotonic()
            said = play_in_a_fork(disk, plan, nth, when, flag, cut_after_s)
            seconds = seconds or time.monotonic() - began
        if not number:
            operations = int(said.pop().removeprefix("ended after "))
        elif said and said[-1].startswith("ended"):
            said.pop()
        problem = None
        try:
            with disk.mounted() as mount:
                judge(mount, said)
                go_on(mount)
        except (AssertionError, SpotError, OSError, ValueError, KeyError, subprocess.CalledProcessError) as error:
            problem = f"{type(error).__name__}: {error}"
        cut_at = disk.mount.with_name("cut-at").read_text()
        line = {"cut_at": cut_at, "nth": nth, "when": when, "flag": flag, "said": said, "problem": problem}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    main(Plan(**{**given, "flags": tuple(given["flags"])}), Path(sys.argv[2]))
