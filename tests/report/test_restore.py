"""`spot restore`: a verified native checkpoint where the user wants it, or nothing at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spot_core.errors import TierError
from spot_core.store.manifest import FileRecord
from spot_core.store.posix import PosixTier
from tests.report.conftest import Spot, everything_in, spot_process
from tests.report.stored import BuiltRun


def _damage(run: BuiltRun, step: int) -> None:
    (manifest,) = run.local.path("manifests").glob(f"*-{step:012d}.json")
    optimizer = run.local.path(f"checkpoints/{manifest.stem}/checkpoint-{step}/optimizer.pt")
    optimizer.write_bytes(optimizer.read_bytes()[::-1])


def test_the_native_part_of_the_newest_checkpoint_appears_and_nothing_else(
    spot: Spot, run: BuiltRun, tmp_path: Path
) -> None:
    run.commit(10)
    newest = run.commit(20)

    result = spot("restore", run.url, "--to", tmp_path / "out")

    assert result.code == 0
    committed = run.local.path(f"checkpoints/{newest}/checkpoint-20")
    assert everything_in(tmp_path / "out") == {
        f"checkpoint-20/{path}": content for path, content in everything_in(committed).items()
    }
    assert str(tmp_path / "out" / "checkpoint-20") in result.out
    assert "PeftModel.from_pretrained" in result.out


def test_a_native_file_is_restored_as_a_file(spot: Spot, run: BuiltRun, tmp_path: Path) -> None:
    run.commit(30, native="step-30.ckpt")
    result = spot("restore", run.url, "--to", tmp_path / "out")
    assert list(everything_in(tmp_path / "out")) == ["step-30.ckpt"]
    assert "trainer.fit(model, ckpt_path=" in result.out


def test_others_may_read_what_was_restored(spot: Spot, run: BuiltRun, tmp_path: Path) -> None:
    run.commit(10)
    spot("restore", run.url, "--to", tmp_path / "out")
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "out" / "checkpoint-10").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_damaged_newest_checkpoint_is_reported_and_the_older_one_is_taken(run: BuiltRun, tmp_path: Path) -> None:
    run.commit(10)
    bad = run.commit(20)
    _damage(run, 20)

    result = spot_process("restore", run.url, "--to", tmp_path / "out")

    assert result.code == 0
    assert f"checkpoint {bad} is damaged, trying the next older one" in result.err
    assert os.listdir(tmp_path / "out") == ["checkpoint-10"]


def test_an_explicit_choice_has_no_second_choice(spot: Spot, run: BuiltRun, tmp_path: Path) -> None:
    run.commit(10)
    bad = run.commit(20)
    _damage(run, 20)

    for choice in (("--step", 20), ("--checkpoint", bad)):
        result = spot("restore", run.url, "--to", tmp_path / "out", *choice)
        assert result.code == 1
        assert "optimizer.pt does not have the digest" in result.err
        assert os.listdir(tmp_path / "out") == []


def test_nothing_valid_is_an_error_that_names_every_checkpoint(spot: Spot, run: BuiltRun, tmp_path: Path) -> None:
    names = [run.commit(10), run.commit(20)]
    _damage(run, 10)
    _damage(run, 20)

    result = spot("restore", run.url, "--to", tmp_path / "out")

    assert result.code == 1
    assert all(str(name) in result.err for name in names)
    assert os.listdir(tmp_path / "out") == []


def test_of_two_lives_at_one_step_the_later_one_is_restored(spot: Spot, run: BuiltRun, tmp_path: Path) -> None:
    run.claim()
    older = run.commit(10)
    run.claim()
    run.commit(10, native="later-10")
    run.commit(20)

    spot("restore", run.url, "--to", tmp_path / "by-step", "--step", 10)
    spot("restore", run.url, "--to", tmp_path / "by-name", "--checkpoint", older)

    assert os.listdir(tmp_path / "by-step") == ["later-10"]
    assert os.listdir(tmp_path / "by-name") == ["checkpoint-10"]


@pytest.mark.parametrize("choice", [("--step", 11), ("--checkpoint", "000009-000000000010"), ("--checkpoint", "x")])
def test_a_checkpoint_that_is_not_there_names_those_that_are(
    spot: Spot, run: BuiltRun, tmp_path: Path, choice: tuple[str, object]
) -> None:
    name = run.commit(10)
    result = spot("restore", run.url, "--to", tmp_path / "out", *choice)
    assert result.code == 2
    assert f"Stored: {name}" in result.err


def test_two_choices_are_a_wrong_call(spot: Spot, run: BuiltRun, tmp_path: Path) -> None:
    name = run.commit(10)
    result = spot("restore", run.url, "--to", tmp_path, "--step", 10, "--checkpoint", name)
    assert result.code == 2
    assert "exclude each other" in result.err


def test_a_run_without_checkpoints_restores_nothing(spot: Spot, run: BuiltRun, tmp_path: Path) -> None:
    result = spot("restore", run.url, "--to", tmp_path / "out")
    assert result.code == 2
    assert "holds no checkpoint yet" in result.err


def test_a_folder_that_is_in_the_way_is_left_as_it_is_before_anything_is_downloaded(
    spot: Spot, run: BuiltRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.commit(10)
    monkeypatch.setattr(PosixTier, "download", lambda *_, **__: pytest.fail("it was downloaded"))
    mine = tmp_path / "out" / "checkpoint-10" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")

    result = spot("restore", run.url, "--to", tmp_path / "out")

    assert result.code == 2
    assert "exists and is left as it is" in result.err
    assert everything_in(tmp_path / "out") == {"checkpoint-10/mine.txt": b"precious"}


def test_an_empty_folder_is_not_in_the_way(spot: Spot, run: BuiltRun, tmp_path: Path) -> None:
    run.commit(10)
    (tmp_path / "out" / "checkpoint-10").mkdir(parents=True)
    assert spot("restore", run.url, "--to", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "checkpoint-10" / "optimizer.pt").exists()


def test_a_file_that_comes_while_downloading_is_not_replaced(
    spot: Spot, run: BuiltRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.commit(30, native="step-30.ckpt")
    download = PosixTier.download

    def someone_else_is_faster(*args: Any, **options: Any) -> FileRecord:
        found = download(*args, **options)
        (tmp_path / "out" / "step-30.ckpt").write_text("theirs")
        return found

    monkeypatch.setattr(PosixTier, "download", someone_else_is_faster)
    assert spot("restore", run.url, "--to", tmp_path / "out").code == 2
    assert everything_in(tmp_path / "out") == {"step-30.ckpt": b"theirs"}


def test_a_download_that_fails_halfway_leaves_nothing(
    spot: Spot, run: BuiltRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.commit(10)
    download, calls = PosixTier.download, []

    def failing(tier: PosixTier, path: str, *args: Any, **options: Any) -> FileRecord:
        calls.append(path)
        if len(calls) == 2:
            raise TierError("the network is gone")
        return download(tier, path, *args, **options)

    monkeypatch.setattr(PosixTier, "download", failing)
    result = spot("restore", run.url, "--to", tmp_path / "out")
    assert result.code == 1
    assert "the network is gone" in result.err
    assert os.listdir(tmp_path / "out") == []


def test_a_checkpoint_larger_than_the_disk_is_not_begun(
    spot: Spot, run: BuiltRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.commit(10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    result = spot("restore", run.url, "--to", tmp_path / "out")
    assert result.code == 2
    assert "has 10 B free" in result.err
    assert os.listdir(tmp_path / "out") == []


def test_what_an_interrupted_restore_left_is_pointed_out(run: BuiltRun, tmp_path: Path) -> None:
    run.commit(10)
    (tmp_path / "out" / ".spot-restore-x1").mkdir(parents=True)
    result = spot_process("restore", run.url, "--to", tmp_path / "out")
    assert result.code == 0
    assert ".spot-restore-x1" in result.err


def test_the_best_model_that_belongs_to_a_checkpoint_is_named(spot: Spot, run: BuiltRun, tmp_path: Path) -> None:
    best = run.commit(10)
    run.commit(20, pins=best)
    assert f"its best model is checkpoint {best}" in spot("restore", run.url, "--to", tmp_path / "out").out


def test_a_manifest_cannot_make_restore_write_elsewhere(spot: Spot, run: BuiltRun, tmp_path: Path) -> None:
    name = run.commit(10)
    manifest = run.local.path(f"manifests/{name}.json")
    manifest.write_text(manifest.read_text().replace('"native": "checkpoint-10"', '"native": "../../escaped"'))
    result = spot("restore", run.url, "--to", tmp_path / "deep" / "out")
    assert result.code == 1
    assert "leaves the checkpoint's folder" in result.err
    assert not (tmp_path / "escaped").exists()


def test_a_manifest_without_files_of_its_native_part_is_damaged(spot: Spot, run: BuiltRun, tmp_path: Path) -> None:
    name = run.commit(10)
    manifest = run.local.path(f"manifests/{name}.json")
    manifest.write_text(manifest.read_text().replace('"native": "checkpoint-10"', '"native": "checkpoint-1"'))
    result = spot("restore", run.url, "--to", tmp_path / "out")
    assert result.code == 1
    assert "lists no file of its native part" in result.err
