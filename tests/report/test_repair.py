"""`spot repair`: damage on one tier is mended from the other, and what cannot be mended is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from spot_core.environment import STORAGE_OPTIONS
from spot_core.report.places import StoredRun
from spot_core.report.repair import Repair, repair
from spot_core.store import catalog, layout, resume
from spot_core.store.identity import read_run
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.store.tier import Tier, open_tier
from spot_core.testing.faults import MOMENTS, Fault, FaultPlan, FaultyTier, SimulatedCrash
from spot_core.testing.invariants import assert_run_invariants
from tests.report.conftest import Spot, everything_in
from tests.report.stored import DAMAGES, BuiltRun, flip, of_newer_format, truncate
from tests.servers import S3Server


@pytest.fixture
def stored(two_tiers: BuiltRun) -> BuiltRun:
    """A run with two checkpoints on both tiers."""
    for step in (10, 20):
        two_tiers.commit(step)
    two_tiers.drain()
    return two_tiers


FIRST, SECOND = CheckpointName(1, 10), CheckpointName(1, 20)


def _remote_file(run: BuiltRun, name: CheckpointName, path: str) -> Path:
    return Path(run.url) / layout.checkpoint(name) / path


def _optimizer(run: BuiltRun, name: CheckpointName) -> Path:
    return _remote_file(run, name, f"checkpoint-{name.step}/optimizer.pt")


def _committed(folder: Path) -> dict[str, bytes]:
    return {
        path: content
        for path, content in everything_in(folder).items()
        if path.startswith((layout.CHECKPOINTS, layout.MANIFESTS))
    }


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_of_the_remote_is_mended_from_the_local_folder(
    spot: Spot, stored: BuiltRun, damage: Callable[[Path], None]
) -> None:
    before = _committed(Path(stored.url))
    damage(_optimizer(stored, FIRST))
    result = spot("repair", stored.url, "--from", stored.local.root)
    assert result.code == 0, result.err
    assert f"repaired {FIRST} from {stored.local.root}: checkpoint-10/optimizer.pt" in result.out
    assert "1 checkpoint repaired, 0 not, 1 had no damage" in result.out
    assert _committed(Path(stored.url)) == before
    assert spot("verify", stored.url).code == 0


def test_the_local_folder_is_mended_from_the_remote(spot: Spot, stored: BuiltRun) -> None:
    before = _committed(stored.local.root)
    flip(stored.file(SECOND, "optimizer.pt"))
    stored.file(SECOND, "data.json").unlink()
    result = spot("repair", stored.local.root, "--from", stored.url)
    assert result.code == 0, result.err
    assert _committed(stored.local.root) == before


def test_the_damaged_bytes_are_set_aside_and_only_they(spot: Spot, stored: BuiltRun) -> None:
    flip(_optimizer(stored, FIRST))
    damaged = _optimizer(stored, FIRST).read_bytes()
    _remote_file(stored, FIRST, "spot/data.json").unlink()
    result = spot("repair", stored.url, "--from", stored.local.root)
    aside = Path(stored.url) / layout.DAMAGED / f"000-{FIRST}"
    assert everything_in(aside) == {f"{FIRST}/checkpoint-10/optimizer.pt": damaged}
    assert f"set aside in {aside}" in result.out


def test_a_file_that_was_missing_leaves_nothing_aside(spot: Spot, stored: BuiltRun) -> None:
    _optimizer(stored, FIRST).unlink()
    assert "set aside" not in spot("repair", stored.url, "--from", stored.local.root).out
    assert not (Path(stored.url) / layout.DAMAGED).exists()


def test_a_second_repair_does_not_overwrite_what_the_first_set_aside(spot: Spot, stored: BuiltRun) -> None:
    for content in (b"first", b"second"):
        _optimizer(stored, FIRST).write_bytes(content)
        assert spot("repair", stored.url, "--from", stored.local.root).code == 0
    aside = everything_in(Path(stored.url) / layout.DAMAGED)
    assert sorted(aside.values()) == [b"first", b"second"]


@pytest.mark.parametrize("where", ["the whole of it", "a digest in it"])
def test_a_damaged_manifest_is_mended(spot: Spot, stored: BuiltRun, where: str) -> None:
    before = _committed(Path(stored.url))
    manifest = Path(stored.url) / layout.manifest(FIRST)
    digest = catalog.read_manifest(stored.remote, FIRST).files[0].digest
    other = ("0" if digest[0] != "0" else "1") + digest[1:]
    manifest.write_text("{" if where == "the whole of it" else manifest.read_text().replace(digest, other))
    assert spot("verify", stored.url).code == 1
    result = spot("repair", stored.url, "--from", stored.local.root)
    assert result.code == 0, result.out
    assert layout.manifest(FIRST) in result.out
    assert _committed(Path(stored.url)) == before


def test_without_damage_nothing_is_written(spot: Spot, stored: BuiltRun) -> None:
    before = everything_in(Path(stored.url))
    result = spot("repair", stored.url, "--from", stored.local.root)
    assert result.code == 0
    assert "0 checkpoints repaired, 0 not, 2 had no damage" in result.out
    assert everything_in(Path(stored.url)) == before


def test_what_is_damaged_on_both_tiers_is_named_and_the_rest_is_mended(spot: Spot, stored: BuiltRun) -> None:
    for name in (FIRST, SECOND):
        flip(_optimizer(stored, name))
    truncate(stored.file(FIRST, "data.json"))
    before = everything_in(Path(stored.url) / layout.checkpoint(FIRST))
    result = spot("repair", stored.url, "--from", stored.local.root)
    assert result.code == 1
    assert f"not repaired: checkpoint {FIRST}: the other copy is damaged as well" in result.out
    assert f"repaired {SECOND}" in result.out
    assert "1 checkpoint repaired, 1 not, 0 had no damage" in result.out
    assert everything_in(Path(stored.url) / layout.checkpoint(FIRST)) == before


def test_a_checkpoint_that_the_other_tier_does_not_hold_is_named(spot: Spot, stored: BuiltRun) -> None:
    flip(_optimizer(stored, FIRST))
    stored.local.delete([layout.manifest(FIRST), layout.checkpoint(FIRST)])
    result = spot("repair", stored.url, "--from", stored.local.root)
    assert result.code == 1
    assert f"not repaired: checkpoint {FIRST}: {stored.local.root} does not hold it" in result.out


def test_another_commit_of_the_same_name_is_not_mixed_in(spot: Spot, stored: BuiltRun) -> None:
    flip(_optimizer(stored, FIRST))
    stored.local.delete([layout.manifest(FIRST), layout.checkpoint(FIRST)])
    stored.commit(10, ballast=5)
    before = everything_in(Path(stored.url))
    result = spot("repair", stored.url, "--from", stored.local.root)
    assert result.code == 1
    assert "holds another checkpoint under this name" in result.out
    assert everything_in(Path(stored.url)) == before


@pytest.mark.parametrize("damage", [None, *DAMAGES.values()], ids=["sound", *DAMAGES])
@pytest.mark.parametrize("side", ["remote", "local"])
def test_a_lost_manifest_is_brought_back_from_the_tier_that_has_the_checkpoint_whole(
    spot: Spot, stored: BuiltRun, damage: Callable[[Path], None] | None, side: str
) -> None:
    here, there = (stored.url, stored.local.root) if side == "remote" else (stored.local.root, stored.url)
    tier, before = PosixTier(here), _committed(Path(here))
    tier.delete([layout.manifest(FIRST)])
    if damage is not None:
        damage(tier.path(f"{layout.checkpoint(FIRST)}/checkpoint-10/optimizer.pt"))
    result = spot("repair", here, "--from", there)
    assert result.code == 0, result.out
    assert layout.manifest(FIRST) in result.out
    assert _committed(Path(here)) == before


def test_a_folder_that_is_a_checkpoint_nowhere_is_not_brought_back(spot: Spot, stored: BuiltRun) -> None:
    """It may be what is left of a deletion."""
    for tier in (stored.remote, stored.local):
        tier.delete([layout.manifest(FIRST)])
    assert spot("repair", stored.url, "--from", stored.local.root).code == 0
    assert catalog.names(stored.remote) == [SECOND]


def test_what_was_pruned_on_one_tier_is_not_brought_back(spot: Spot, stored: BuiltRun) -> None:
    stored.remote.delete([layout.manifest(FIRST), layout.checkpoint(FIRST)])
    assert "1 had no damage" in spot("repair", stored.url, "--from", stored.local.root).out
    assert catalog.names(stored.remote) == [SECOND]


def test_what_a_newer_release_committed_is_left_as_it_is(spot: Spot, stored: BuiltRun) -> None:
    of_newer_format(stored.remote, FIRST)
    before = everything_in(Path(stored.url))
    result = spot("repair", stored.url, "--from", stored.local.root)
    assert result.code == 1
    assert "has format version 2, this release reads 1: upgrade" in result.out
    assert everything_in(Path(stored.url)) == before


def test_a_repair_says_for_machines_what_it_did(spot: Spot, stored: BuiltRun) -> None:
    for name in (FIRST, SECOND):
        flip(_optimizer(stored, name))
    flip(stored.file(FIRST, "optimizer.pt"))
    result = spot("repair", stored.url, "--from", stored.local.root, "--json")
    assert result.code == 1
    assert (result.json["is_whole"], result.json["sound"], result.json["url"]) == (False, 0, stored.url)
    mended, damaged = result.json["damaged"]
    assert mended["name"] == str(SECOND) and mended["files"] == ["checkpoint-20/optimizer.pt"]
    assert mended["error"] is None and mended["aside"].startswith(f"{stored.url}/{layout.DAMAGED}/")
    assert damaged["name"] == str(FIRST) and "damaged as well" in damaged["error"]


def test_another_run_is_no_other_copy(spot: Spot, stored: BuiltRun, tmp_path: Path) -> None:
    other = BuiltRun(tmp_path / "elsewhere" / "alpaca")
    result = spot("repair", stored.url, "--from", other.url)
    assert result.code == 2
    assert "two different runs" in result.err


def test_a_run_is_not_its_own_other_copy(spot: Spot, stored: BuiltRun) -> None:
    for same in (stored.url, f"file://{stored.url}", f"{stored.url}/../alpaca"):
        result = spot("repair", stored.url, "--from", same)
        assert result.code == 2
        assert "cannot be repaired from itself" in result.err


def test_while_a_life_is_active_nothing_is_written(spot: Spot, stored: BuiltRun) -> None:
    stored.live()
    flip(_optimizer(stored, FIRST))
    before = everything_in(Path(stored.url))
    result = spot("repair", stored.url, "--from", stored.local.root)
    assert result.code == 2
    assert "is running on" in result.err and "Nothing was written" in result.err
    assert everything_in(Path(stored.url)) == before


def test_damage_in_a_bucket_is_mended_and_set_aside_there(
    s3_server: S3Server, tmp_path: Path, spot: Spot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORAGE_OPTIONS, json.dumps(s3_server.options))
    run = BuiltRun(tmp_path / "nvme" / "alpaca", open_tier(f"s3://{s3_server.new_bucket()}/alpaca", s3_server.options))
    name = run.commit(10)
    run.drain()
    path = f"{layout.checkpoint(name)}/checkpoint-10/optimizer.pt"
    run.remote.replace(path, b"damaged")
    run.remote.delete([f"{layout.checkpoint(name)}/spot/data.json"])

    result = spot("repair", run.url, "--from", run.local.root)

    assert result.code == 0, result.err + result.out
    assert run.remote.read(f"{layout.DAMAGED}/000-{name}/{name}/checkpoint-10/optimizer.pt") == b"damaged"
    assert spot("verify", run.url).code == 0

    flip(run.file(name, "optimizer.pt"))
    assert spot("repair", run.local.root, "--from", run.url).code == 0
    assert spot("verify", run.local.root).code == 0


def _repair(target: Tier, source: Tier) -> Repair:
    runs = [StoredRun(tier, read_run(tier) or {}) for tier in (target, source)]
    return repair(runs[0], runs[1], now=0.0, on_progress=lambda *_: None)


def _damage_three_ways(run: BuiltRun) -> None:
    flip(_optimizer(run, FIRST))
    _remote_file(run, FIRST, "spot/data.json").unlink()
    (Path(run.url) / layout.manifest(SECOND)).write_bytes(b"{")


def test_a_crash_while_a_lost_manifest_is_brought_back_is_mended_by_running_again(
    stored: BuiltRun, tmp_path: Path
) -> None:
    stored.remote.delete([layout.manifest(FIRST)])
    flip(_optimizer(stored, FIRST))
    sound = _committed(stored.local.root)
    nth, has_crashed = 0, True
    while has_crashed:
        nth += 1
        for when in MOMENTS:
            remote = PosixTier(tmp_path / f"{nth}-{when}")
            shutil.copytree(stored.url, remote.root)
            plan = FaultPlan.crash_at(nth, when)
            try:
                _repair(FaultyTier(remote, plan), FaultyTier(stored.local, plan, name="local"))
                has_crashed = False
            except SimulatedCrash:
                has_crashed = True
            for name in catalog.names(remote):
                resume.verify(remote, catalog.read_manifest(remote, name))
            assert _repair(remote, stored.local).is_whole, plan.fired
            assert _committed(remote.root) == sound, plan.fired
    assert nth > 10


def test_a_file_that_cannot_be_written_is_named_and_the_others_are_mended(stored: BuiltRun) -> None:
    _damage_three_ways(stored)
    plan = FaultPlan(Fault(operation="upload", path=layout.checkpoint(FIRST), count=None))
    result = _repair(FaultyTier(stored.remote, plan), stored.local)
    assert [(each.name, each.error) for each in result.damaged] == [(SECOND, None), (FIRST, "injected fault")]
    assert not result.is_whole
    assert _repair(stored.remote, stored.local).is_whole


def test_bytes_that_change_on_the_way_are_not_taken_for_mended(stored: BuiltRun) -> None:
    flip(_optimizer(stored, FIRST))

    class Corrupting(PosixTier):
        def upload(self, source: Path, path: str, on_bytes: Callable[[int], None]) -> None:
            super().upload(source, path, on_bytes)
            flip(self.path(path))

    result = _repair(Corrupting(stored.url), stored.local)
    assert "does not have the digest" in str(result.damaged[0].error)
    assert _repair(stored.remote, stored.local).is_whole


def test_a_crash_at_any_operation_is_mended_by_running_again(stored: BuiltRun, tmp_path: Path) -> None:
    _damage_three_ways(stored)
    sound = _committed(stored.local.root)
    nth = 0
    while True:
        nth += 1
        for when in MOMENTS:
            remote = PosixTier(tmp_path / f"{nth}-{when}")
            shutil.copytree(stored.url, remote.root)
            plan = FaultPlan.crash_at(nth, when)
            try:
                _repair(FaultyTier(remote, plan), FaultyTier(stored.local, plan, name="local"))
                has_crashed = False
            except SimulatedCrash:
                has_crashed = True
            assert has_crashed == bool(plan.fired)
            assert set(catalog.names(remote)) == {FIRST, SECOND}, plan.fired
            assert _repair(remote, stored.local).is_whole, plan.fired
            assert _committed(remote.root) == sound, plan.fired
            assert_run_invariants(stored.local, remote, durable=SECOND)
        if not has_crashed:
            assert nth > 20
            return
