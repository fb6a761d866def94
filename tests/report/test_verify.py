"""`spot verify`: finds every damaged byte, names it, and changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from spot_core.errors import TierError
from spot_core.store import layout, retention
from spot_core.store.manifest import FileRecord
from spot_core.store.posix import PosixTier
from tests.report.conftest import Spot, everything_in
from tests.report.stored import DAMAGES, BuiltRun, flip, of_newer_format, truncate


def test_a_sound_run_verifies_and_is_left_as_it_was(spot: Spot, run: BuiltRun) -> None:
    run.live()
    run.commit(1)
    run.commit(2)
    before = everything_in(run.local.root)

    result = spot("verify", run.url)

    assert result.code == 0
    assert "2 checkpoints verified" in result.out
    assert everything_in(run.local.root) == before


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_named_and_ends_with_1(spot: Spot, run: BuiltRun, damage: Callable[[Path], None]) -> None:
    sound, bad = run.commit(1), run.commit(2)
    damage(run.file(bad, "optimizer.pt"))

    result = spot("verify", run.url)
    view = spot("verify", run.url, "--json")

    assert result.code == view.code == 1
    assert f"{layout.checkpoint(bad)}/checkpoint-2/optimizer.pt" in result.out
    assert "1 of 2 checkpoints failed" in result.out
    assert view.json["is_sound"] is False
    (checked,) = view.json["runs"]
    assert {row["name"]: row["result"] for row in checked["checkpoints"]} == {str(bad): "damaged", str(sound): "ok"}


def test_damage_comes_with_the_command_that_mends_it(spot: Spot, run: BuiltRun) -> None:
    bad = run.commit(1)
    assert "spot repair" not in spot("verify", run.url).out
    flip(run.file(bad, "optimizer.pt"))
    assert f"spot repair {run.url} --from URL" in spot("verify", run.url).out


def test_all_damaged_files_are_named_not_only_the_first(spot: Spot, run: BuiltRun) -> None:
    one, two = run.commit(1), run.commit(2)
    flip(run.file(one, "optimizer.pt"))
    run.file(one, "data.json").unlink()
    truncate(run.file(two, "adapter_config.json"))

    out = spot("verify", run.url).out

    for path in (
        f"{one}/checkpoint-1/optimizer.pt",
        f"{one}/spot/data.json",
        f"{two}/checkpoint-2/adapter_config.json",
    ):
        assert path in out


def test_a_damaged_manifest_is_damage(spot: Spot, run: BuiltRun) -> None:
    name = run.commit(1)
    run.commit(2)
    run.local.path(layout.manifest(name)).write_bytes(b"{")
    result = spot("verify", run.url)
    assert result.code == 1
    assert layout.manifest(name) in result.out


def test_folders_without_a_manifest_are_a_note_not_damage(spot: Spot, run: BuiltRun) -> None:
    run.commit(1)
    orphan = run.local.path(f"{layout.CHECKPOINTS}/000001-000000000009")
    orphan.mkdir()
    (orphan / "half.bin").write_bytes(b"half")

    result = spot("verify", run.url)

    assert result.code == 0
    assert "checkpoints/000001-000000000009 has no manifest" in result.out
    assert spot("verify", run.url, "--json").json["runs"][0]["orphans"] == ["checkpoints/000001-000000000009"]


def test_a_mark_of_completion_is_no_stranger(spot: Spot, run: BuiltRun) -> None:
    run.complete(run.commit(1))
    run.local.path(f"{layout.MANIFESTS}/README").write_text("hello")
    (checked,) = spot("verify", run.url, "--json").json["runs"]
    assert checked["strangers"] == ["manifests/README"]


def test_a_checkpoint_pruned_while_it_is_read_is_not_damage(
    spot: Spot, run: BuiltRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned, kept = run.commit(1), run.commit(2)
    record, lock = PosixTier.record, threading.Lock()

    def prune_then_record(tier: PosixTier, path: str) -> FileRecord:
        with lock:
            retention.delete_checkpoints(tier, [pruned] if tier.path(layout.manifest(pruned)).exists() else [])
        return record(tier, path)

    monkeypatch.setattr(PosixTier, "record", prune_then_record)
    result = spot("verify", run.url, "--json")
    assert [row["name"] for row in result.json["runs"][0]["checkpoints"]] == [str(kept)]
    assert result.code == 0


def test_a_file_that_cannot_be_read_fails_without_being_called_damaged(
    spot: Spot, run: BuiltRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, sound = run.commit(1), run.commit(2)
    record = PosixTier.record

    def broken_disk(tier: PosixTier, path: str) -> FileRecord:
        if str(bad) in path:
            raise TierError(5, f"cannot read {path}: Input/output error")
        return record(tier, path)

    monkeypatch.setattr(PosixTier, "record", broken_disk)
    result = spot("verify", run.url)
    assert result.code == 1
    assert "unreadable: cannot read" in result.out and "Input/output error" in result.out
    rows = spot("verify", run.url, "--json").json["runs"][0]["checkpoints"]
    assert {row["name"]: row["result"] for row in rows} == {str(bad): "unreadable", str(sound): "ok"}


def test_a_root_verifies_every_run_although_one_is_unreadable(spot: Spot, run: BuiltRun, tmp_path: Path) -> None:
    run.commit(1)
    other = BuiltRun(tmp_path / "runs" / "zephyr")
    flip(other.file(other.commit(5), "optimizer.pt"))
    bad = tmp_path / "runs" / "bad"
    bad.mkdir()
    (bad / layout.RUN).write_text("{")

    result = spot("verify", tmp_path / "runs", "--json")

    assert result.code == 1
    assert {run["run"]: run["is_sound"] for run in result.json["runs"]} == {
        "alpaca": True,
        "bad": False,
        "zephyr": False,
    }


@pytest.mark.parametrize("side", ["local", "remote"])
def test_a_newer_format_is_told_by_name_and_not_called_damage(side: str, spot: Spot, two_tiers: BuiltRun) -> None:
    newer, sound = two_tiers.commit(10), two_tiers.commit(20)
    two_tiers.drain()
    tier = two_tiers.local if side == "local" else two_tiers.remote
    of_newer_format(tier, newer)
    before = everything_in(Path(tier.url))

    result, listed = spot("verify", tier.url), spot("ls", tier.url)

    assert result.code == 1
    assert f"newer format: {tier.url}/{layout.manifest(newer)}: manifest {newer} has format version 2" in result.out
    assert "damaged" not in result.out and "spot repair" not in result.out
    rows = spot("verify", tier.url, "--json").json["runs"][0]["checkpoints"]
    assert {row["name"]: row["result"] for row in rows} == {str(newer): "newer format", str(sound): "ok"}
    assert "newer format" in listed.out and "upgrade" in listed.out and "damaged" not in listed.out
    flags = {row["name"]: row["is_newer_format"] for row in spot("ls", tier.url, "--json").json["checkpoints"]}
    assert flags == {str(newer): True, str(sound): False}
    assert everything_in(Path(tier.url)) == before


@pytest.mark.parametrize("side", ["local", "remote"])
def test_files_that_lost_their_manifest_are_told_on_either_tier(side: str, spot: Spot, two_tiers: BuiltRun) -> None:
    lost, _ = two_tiers.commit(10), two_tiers.commit(20)
    two_tiers.drain()
    tier = two_tiers.local if side == "local" else two_tiers.remote
    tier.delete([layout.manifest(lost)])
    result = spot("verify", tier.url, "--json")
    assert result.code == 0
    assert result.json["runs"][0]["orphans"] == [layout.checkpoint(lost)]
