"""What a power failure would leave: nothing gets its final name before its bytes are on the disk.

A SIGKILL does not show a missing fsync, since the page cache survives it. So the order of the calls is what is
tested: a name may appear only after everything under it was fsynced since it was last changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spot_core.store import catalog, incarnation, layout, retention
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.testing.checkpoints import commit_checkpoint

ONE, TWO = CheckpointName(1, 10), CheckpointName(1, 20)


class Disk:
    """Watches this process's calls. unsynced: inodes of files and folders changed since their last fsync."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.unsynced: set[int] = set()
        self.named: list[str] = []
        self.torn: list[str] = []
        watched = (
            ("write", self._wrote),
            ("fsync", self._synced),
            ("mkdir", self._entered),
            ("unlink", self._entered),
            ("link", self._linked),
            ("replace", self._replaced),
        )
        for name, note in watched:
            monkeypatch.setattr(os, name, self._watched(getattr(os, name), note))

    @staticmethod
    def _watched(function: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if "dir_fd" in kwargs:
                return function(*args, **kwargs)
            if note.__name__ in {"_linked", "_replaced"}:
                note(*args)
                return function(*args, **kwargs)
            result = function(*args, **kwargs)
            note(*args)
            return result

        return call

    def _wrote(self, descriptor: int, *_: object) -> None:
        self.unsynced.add(os.fstat(descriptor).st_ino)

    def _synced(self, descriptor: int) -> None:
        self.unsynced.discard(os.fstat(descriptor).st_ino)

    def _entered(self, path: Any, *_: object) -> None:
        self.unsynced.add(Path(path).parent.stat().st_ino)

    def _linked(self, source: Any, target: Any) -> None:
        self._names(source, target)

    def _replaced(self, source: Any, target: Any) -> None:
        self._names(source, target)

    def _names(self, source: Any, target: Any) -> None:
        source, target = Path(source), Path(target)
        self.named.append(target.name)
        inside = [source, *source.rglob("*")] if source.is_dir() else [source]
        self.torn += [f"{target.name}: {path.name}" for path in inside if path.stat().st_ino in self.unsynced]
        self.unsynced.add(target.parent.stat().st_ino)

    def is_durable(self, folder: Path) -> bool:
        return folder.stat().st_ino not in self.unsynced


@pytest.fixture
def tier(tmp_path: Path) -> PosixTier:
    tmp_path.joinpath("tier").mkdir()
    return PosixTier(tmp_path / "tier")


def test_everything_is_on_the_disk_before_it_is_named(tier: PosixTier, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    manifest = commit_checkpoint(tier, ONE)
    tier.replace("lives/000001.json", b"life")
    tier.upload(tier.path(f"{layout.checkpoint(ONE)}/{manifest.files[0].path}"), "copy/model.bin", lambda _: None)
    incarnation.claim(tier, tier, 0.0)
    assert disk.named[:2] == [str(ONE), f"{ONE}.json"]
    assert {"000001.json", "model.bin"} <= set(disk.named)
    assert disk.torn == []


def test_the_files_name_is_on_the_disk_before_the_manifests(tier: PosixTier, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    create = PosixTier.create

    def create_when_durable(self: PosixTier, path: str, data: bytes) -> None:
        assert path == layout.manifest(ONE)
        assert disk.is_durable(tier.path(layout.CHECKPOINTS)) and disk.is_durable(tier.root)
        create(self, path, data)

    monkeypatch.setattr(PosixTier, "create", create_when_durable)
    commit_checkpoint(tier, ONE)
    assert disk.is_durable(tier.path(layout.MANIFESTS)) and disk.is_durable(tier.root)


def test_a_manifest_is_gone_from_the_disk_before_its_files_are(
    tier: PosixTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (ONE, TWO):
        commit_checkpoint(tier, name)
    disk = Disk(monkeypatch)
    delete = PosixTier.delete

    def delete_when_durable(self: PosixTier, paths: Any) -> None:
        paths = list(paths)
        if layout.checkpoint(ONE) in paths:
            assert disk.is_durable(tier.path(layout.MANIFESTS))
        delete(self, paths)

    monkeypatch.setattr(PosixTier, "delete", delete_when_durable)
    retention.delete_checkpoints(tier, [ONE])
    assert catalog.names(tier) == [TWO]


def test_a_downloaded_file_is_on_the_disk_when_it_returns(tier: PosixTier, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = commit_checkpoint(tier, ONE)
    disk = Disk(monkeypatch)
    target = tier.path("target")
    tier.download(f"{layout.checkpoint(ONE)}/{manifest.files[0].path}", target, lambda _: None)
    assert target.stat().st_ino not in disk.unsynced
