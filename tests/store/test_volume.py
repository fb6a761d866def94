"""Room on the local volume: only superseded copies that are durable go, and what does not fit is refused."""

from __future__ import annotations

import errno
import logging
import shutil
from pathlib import Path

import pytest

from spot_core.errors import ConfigError, TierError
from spot_core.store import catalog, volume
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier, check_usable
from spot_core.store.volume import describe_place, file_system, make_room
from spot_core.testing.checkpoints import commit_checkpoint

ONE, TWO, THREE, FOUR = (CheckpointName(1, step) for step in (10, 20, 30, 40))

MOUNTS = r"""/dev/root / ext4 rw 0 0
server:/export /data nfs4 rw,vers=4.2 0 0
/dev/nvme1n1 /data/local\040disk xfs rw 0 0
scratch /data/over ext4 rw 0 0
me@there: /data/over fuse.sshfs rw 0 0
"""


class Volume:
    """A volume whose free space grows by one unit with each checkpoint that is gone from `tier`."""

    def __init__(self, tier: PosixTier, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.unit, self.total = 1_000_000, 1
        held = len(catalog.names(tier))

        def disk_usage(folder: Path) -> object:
            gone = held - len(catalog.names(tier))
            return shutil._ntuple_diskusage(self.total, 0, (free + gone) * self.unit)  # type: ignore[attr-defined]

        monkeypatch.setattr(shutil, "disk_usage", disk_usage)


@pytest.fixture
def tier(tmp_path: Path) -> PosixTier:
    tier = PosixTier(tmp_path)
    for name in (ONE, TWO, THREE, FOUR):
        commit_checkpoint(tier, name)
    return tier


def test_nothing_goes_while_there_is_room(tier: PosixTier, monkeypatch: pytest.MonkeyPatch) -> None:
    Volume(tier, 1, monkeypatch)
    assert make_room(tier, 900_000, durable={ONE, TWO, THREE, FOUR}) == []


def test_the_oldest_durable_go_first_and_only_as_many_as_needed(
    tier: PosixTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    Volume(tier, 0, monkeypatch)
    assert make_room(tier, 1_500_000, durable={ONE, TWO, THREE, FOUR}) == [ONE, TWO]
    assert catalog.names(tier) == [FOUR, THREE]


@pytest.mark.parametrize(
    ("durable", "pinned", "stay"),
    [
        (set(), set(), {ONE, TWO, THREE, FOUR}),
        ({TWO}, set(), {ONE, TWO, THREE, FOUR}),  # one is not itself durable, two has no newer durable one
        ({ONE, TWO, THREE, FOUR}, set(), {FOUR}),
        ({ONE, TWO, THREE, FOUR}, {TWO}, {TWO, FOUR}),
        ({ONE, THREE}, set(), {TWO, THREE, FOUR}),
    ],
)
def test_what_does_not_fit_is_refused_and_what_must_stay_stays(
    durable: set[CheckpointName],
    pinned: set[CheckpointName],
    stay: set[CheckpointName],
    tier: PosixTier,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Volume(tier, 0, monkeypatch)
    with pytest.raises(TierError, match=f"no room in {tier.url}: 20.4 MB needed, .* MB free") as caught:
        make_room(tier, 20_000_000, durable=durable, pinned=pinned)
    assert caught.value.errno == errno.ENOSPC
    assert set(catalog.names(tier)) == stay


def test_what_a_local_checkpoint_refers_to_stays_until_that_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = PosixTier(tmp_path)
    commit_checkpoint(tier, ONE)
    commit_checkpoint(tier, TWO, pins=ONE)
    commit_checkpoint(tier, THREE)
    commit_checkpoint(tier, FOUR)
    Volume(tier, 0, monkeypatch)
    assert make_room(tier, 900_000, durable={ONE, TWO, THREE, FOUR}) == [TWO]
    with pytest.raises(TierError):
        make_room(tier, 20_000_000, durable={ONE, TWO, THREE, FOUR}, pinned={THREE})
    assert catalog.names(tier) == [FOUR, THREE]


def test_a_file_system_that_does_not_tell_its_size_is_tried(tier: PosixTier, monkeypatch: pytest.MonkeyPatch) -> None:
    Volume(tier, 0, monkeypatch).total = 0
    assert make_room(tier, 1 << 60, durable={ONE, TWO}) == []


def test_the_next_life_of_a_run_starts_on_a_disk_that_its_own_checkpoints_fill(
    tier: PosixTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = sum(file.stat().st_size for file in tier.path("checkpoints").rglob("*") if file.is_file())
    Volume(tier, 0, monkeypatch)
    check_usable(tier.root, held)
    with pytest.raises(ConfigError, match="0 MB free"):
        check_usable(tier.root, held + 1)


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/data/runs", "nfs4"),
        ("/database", "ext4"),
        ("/data/local disk/runs", "xfs"),
        ("/data/over/runs", "fuse.sshfs"),
    ],
)
def test_the_file_system_is_that_of_the_last_mount_above(folder: str, kind: str) -> None:
    assert file_system(Path(folder), MOUNTS) == kind


def test_where_the_tiers_are_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(describe_place(tmp_path / "not yet", "s3://bucket/run")) == []
    one_volume = (logging.INFO, "local and remote tier are on one volume: losing it loses both")
    for remote in (f"{tmp_path}/remote/run", f"file://{tmp_path}/remote/run"):
        assert list(describe_place(tmp_path, remote)) == [one_volume]
    assert list(describe_place(tmp_path, "/proc/run")) == []
    monkeypatch.setattr(volume, "file_system", lambda folder: "lustre")
    ((level, sentence),) = describe_place(tmp_path, "s3://bucket/run")
    assert level == logging.WARNING
    assert "network file system (lustre)" in sentence
