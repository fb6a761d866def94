"""The overflow: private memory for checkpoints on their way to the remote, never more than there is, and given back."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spot_core.errors import TierError
from spot_core.store import catalog, layout, memory, overflow
from spot_core.store.layout import CheckpointName
from spot_core.store.overflow import PLACE, Overflow, room_bytes
from spot_core.store.posix import PosixTier
from spot_core.testing.checkpoints import commit_checkpoint

ONE, TWO, THREE = (CheckpointName(1, step) for step in (10, 20, 30))
LATER = CheckpointName(2, 40)


def test_it_is_private_and_made_when_needed(over: Overflow, memory: Path) -> None:
    assert over.tier is None and over.names() == [] and os.listdir(memory) == []
    tier = over.make_room(1_000_000)
    assert tier.root == over.folder
    assert tier.root.stat().st_mode & 0o777 == 0o700
    commit_checkpoint(tier, ONE)
    assert over.names() == [ONE]


def test_each_run_has_its_own(over: Overflow, remote: PosixTier, tmp_path: Path) -> None:
    """A copied run folder has the same id, and its checkpoints must not meet."""
    folders = {over.folder, Overflow.of(remote, "another").folder, Overflow.of(PosixTier(tmp_path), "an id").folder}
    assert len(folders) == 3
    assert Overflow.of(remote, "an id").folder == over.folder


@pytest.mark.parametrize("kind", ["open to others", "a link", "a file", "another user's"])
def test_a_folder_that_is_not_this_users_alone_is_not_used(kind: str, over: Overflow, tmp_path: Path) -> None:
    assert over.folder is not None
    if kind == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        over.folder.symlink_to(tmp_path / "elsewhere")
    elif kind == "a file":
        over.folder.touch()
    else:
        over.folder.mkdir(mode=0o755 if kind == "open to others" else 0o700)
    if kind == "another user's":
        os.chown(over.folder, 12345, 12345)
    assert over.tier is None and over.names() == []
    with pytest.raises(TierError, match="is not a folder of this user alone"):
        over.make_room(1)
    assert over.remove(9), "and is left alone"
    assert os.path.lexists(over.folder)


def test_what_is_too_large_for_the_file_system_is_refused(over: Overflow) -> None:
    with pytest.raises(TierError, match=r"4\.3 MB needed, 4\.2 MB of memory to spare") as caught:
        over.make_room(4_200_000)  # of 8 MB, half of which data loaders may need
    assert caught.value.errno == errno.ENOSPC
    assert over.tier is None


def test_a_tenth_of_the_memory_stays_free(over: Overflow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "total_bytes", lambda: 20_000_000)
    monkeypatch.setattr(memory, "available_bytes", lambda: 3_000_000)
    assert room_bytes() == 1_000_000
    over.make_room(900_000)
    with pytest.raises(TierError, match=r"1\.0 MB of memory to spare"):
        over.make_room(1_000_000)


def test_no_more_than_two_are_there_at_a_time(over: Overflow) -> None:
    for name in (ONE, TWO):
        commit_checkpoint(over.make_room(1000), name)
    with pytest.raises(TierError, match="holds 2 checkpoints that are not drained yet"):
        over.make_room(1000)
    over.clear(but=[TWO])
    over.make_room(1000)


@pytest.mark.parametrize("setting", ["", "not there", "on a disk"])
def test_without_a_file_system_in_memory_there_is_none(
    setting: str, tmp_path: Path, remote: PosixTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "on a disk").mkdir()
    if setting == "on a disk" and overflow.volume.file_system(tmp_path) == "tmpfs":
        pytest.skip("the tests run in memory")
    monkeypatch.setenv(PLACE, str(tmp_path / setting) if setting else "")
    none = Overflow.of(remote, "an id")
    assert none.folder is None and none.tier is None and none.names() == [] and room_bytes() == 0
    with pytest.raises(TierError, match="no file system in memory"):
        none.make_room(1)
    none.clear(but=[])
    assert none.remove(9)


def test_clearing_keeps_what_is_wanted_and_what_is_being_written(over: Overflow) -> None:
    tier = over.make()
    for name in (ONE, TWO):
        commit_checkpoint(tier, name)
    catalog.mark_complete(tier, ONE, 10)
    (tier.stage(THREE) / "half").write_bytes(b"half")
    tier.path(f"{layout.STAGING}/resume-7").mkdir()
    os.link(tier.path(layout.manifest(ONE)), tier.path(f"{layout.STAGING}/resume-7/linked"))
    over.clear(but=[TWO])
    assert over.names() == [TWO] and tier.list(layout.CHECKPOINTS) == [str(TWO)]
    assert tier.list(layout.STAGING) == [str(THREE)], "links of a resume keep the memory of what is deleted"
    assert catalog.completions(tier) == {ONE: 10}, "it may not have been drained"


def test_the_end_of_a_life_gives_everything_back(over: Overflow, memory: Path) -> None:
    tier = over.make()
    for name in (ONE, TWO):
        commit_checkpoint(tier, name)
    catalog.mark_complete(tier, TWO, 20)
    tier.stage(THREE)
    tier.path(layout.JOURNAL).mkdir()
    tier.path(f"{layout.JOURNAL}/000001.agent.json").write_text("{}")
    assert over.remove(1)
    assert os.listdir(memory) == []


def test_the_end_of_a_life_leaves_a_later_lifes_part(over: Overflow) -> None:
    tier = over.make()
    for name in (ONE, LATER):
        commit_checkpoint(tier, name)
    tier.stage(CheckpointName(2, 50))
    assert over.remove(1)
    assert over.names() == [LATER] and tier.list(layout.STAGING) == [str(CheckpointName(2, 50))]


def test_what_is_durable_nowhere_may_stay(over: Overflow) -> None:
    for name in (ONE, TWO):
        commit_checkpoint(over.make(), name)
    assert over.remove(1, but=[TWO])
    assert over.names() == [TWO]


def test_nothing_is_deleted_while_another_agent_holds_it(over: Overflow, remote: PosixTier, memory: Path) -> None:
    """The next life may be about to load what this one drains; a dead one holds nothing."""
    commit_checkpoint(over.make(), ONE)
    script = "import sys; from pathlib import Path; from spot_core.store.overflow import Overflow\n"
    script += (
        f"over = Overflow(Path({str(over.folder)!r})); over.hold(); print(over.names(), flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline()
    over.clear(but=[])
    assert not over.remove(1)
    assert over.names() == [ONE]
    other.kill()
    other.communicate()
    assert over.remove(1)
    assert os.listdir(memory) == []


def test_a_lock_on_a_folder_that_was_deleted_holds_nothing(over: Overflow, remote: PosixTier) -> None:
    commit_checkpoint(over.make(), ONE)
    other = Overflow(over.folder)
    other.hold()
    tier = over.make()
    tier.delete(tier.list(""))
    tier.root.rmdir()
    commit_checkpoint(over.make(), TWO)
    over.hold()
    assert over.remove(1) and over.names() == []
    other.hold()


def test_a_groups_limit_counts_and_not_the_machines_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "pod"
    group.mkdir()
    (group / "memory.max").write_text("8000\n")
    (group / "memory.current").write_text("5000\n")
    (group / "memory.stat").write_text("anon 1000\ninactive_file 1500\nshmem 900\n")
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(memory, "_groups", lambda: iter([group, tmp_path]))
    assert memory.total_bytes() == 8000
    assert memory.available_bytes() == 4500, "what the kernel gives back by itself is not taken"
    (group / "memory.current").write_text("9900\n")
    assert memory.available_bytes() == 0


def test_the_groups_of_this_process_are_readable() -> None:
    assert all(folder.is_absolute() for folder in memory._groups())
    assert 0 < memory.available_bytes() <= memory.total_bytes()
