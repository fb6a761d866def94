"""`spot` and a run whose manifests are signed: every command refuses what a stranger wrote, and shows why."""

from __future__ import annotations

from pathlib import Path

import pytest

from spot_core.store import catalog, layout
from spot_core.store.layout import CheckpointName
from spot_core.store.signing import Signing
from tests.report.conftest import Spot
from tests.report.stored import BuiltRun, flip

KEY = "key of this run 0"
NOT_SIGNED = "is not signed with this run's key"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"{KEY}\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def signed(two_tiers: BuiltRun) -> BuiltRun:
    """One checkpoint of this run, drained, and a newer one that a stranger put on the remote."""
    two_tiers.local.signing = two_tiers.remote.signing = Signing("alpaca", (KEY,))
    two_tiers.live("completed", steps=(0, 1))
    two_tiers.commit(1)
    two_tiers.drain()
    return two_tiers


@pytest.fixture
def forged(signed: BuiltRun) -> CheckpointName:
    stranger = BuiltRun(Path(signed.remote.url))
    stranger.number = signed.number
    name = stranger.commit(2)
    catalog.mark_complete(stranger.local, name, 2)
    return name


def test_every_command_takes_the_key_from_a_file_or_from_the_environment(
    spot: Spot, signed: BuiltRun, forged: CheckpointName, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for how in ("option", "file", "variable"):
        with monkeypatch.context() as patch:
            option = ["--signing-key-file", key_file] if how == "option" else []
            if how == "file":
                patch.setenv("SPOT_SIGNING_KEY_FILE", str(key_file))
            if how == "variable":
                patch.setenv("SPOT_SIGNING_KEY", KEY)
            listed = {row["name"]: row for row in spot("ls", signed.url, "--json", *option).json["checkpoints"]}
            assert NOT_SIGNED in listed[str(forged)]["error"] and not listed[str(forged)]["is_complete"]
            assert listed["000001-000000000001"]["error"] is None
            status = spot("status", signed.url, "--json", *option).json
            assert status["newest_durable"]["step"] == 1 and not status["is_complete"]
            assert NOT_SIGNED in status["damaged_manifests"][0]
            verified = spot("verify", signed.url, *option)
            assert verified.code == 1 and NOT_SIGNED in " ".join(verified.out.split())


def test_without_the_key_the_commands_work(spot: Spot, signed: BuiltRun, forged: CheckpointName) -> None:
    assert spot("verify", signed.url).code == 0
    assert spot("status", signed.url, "--json").json["newest_durable"]["step"] == 2


def test_restore_goes_on_to_the_newest_that_is_signed(
    spot: Spot, signed: BuiltRun, forged: CheckpointName, key_file: Path, tmp_path: Path
) -> None:
    result = spot("restore", signed.url, "--to", tmp_path / "home", "--signing-key-file", key_file)
    assert result.code == 0 and (tmp_path / "home" / "checkpoint-1").is_dir()
    chosen = spot("restore", signed.url, "--to", tmp_path / "x", "--step", 2, "--signing-key-file", key_file)
    assert chosen.code == 1 and NOT_SIGNED in chosen.err and not (tmp_path / "x").exists()


def test_repair_takes_nothing_from_a_stranger(spot: Spot, signed: BuiltRun, key_file: Path) -> None:
    """A copy that verifies by its own, forged manifest is not a healthy one."""
    name = CheckpointName(1, 1)
    flip(Path(signed.remote.url, layout.checkpoint(name), "checkpoint-1", "optimizer.pt"))
    manifest = signed.local.path(layout.manifest(name))
    manifest.write_bytes(manifest.read_bytes().replace(b'"signature"', b'"signatory"'))
    result = spot("repair", signed.url, "--from", signed.local.url, "--signing-key-file", key_file)
    assert result.code == 1 and NOT_SIGNED in " ".join(result.out.split())


def test_repair_mends_a_forged_manifest_from_the_signed_copy(spot: Spot, signed: BuiltRun, key_file: Path) -> None:
    name = CheckpointName(1, 1)
    sound = signed.remote.read(layout.manifest(name))
    unsigned = sound.replace(b'"signature"', b'"signatory"')
    Path(signed.remote.url, layout.manifest(name)).write_bytes(unsigned)
    result = spot("repair", signed.url, "--from", signed.local.url, "--signing-key-file", key_file)
    assert result.code == 0, result.out + result.err
    assert signed.remote.read(layout.manifest(name)) == sound


def test_prune_does_not_count_what_a_stranger_wrote(
    spot: Spot, signed: BuiltRun, forged: CheckpointName, key_file: Path
) -> None:
    signed.commit(3)
    signed.commit(4)
    signed.drain()
    stranger = BuiltRun(Path(signed.remote.url))
    stranger.number = signed.number
    newest = stranger.commit(5)
    result = spot("prune", signed.url, "--keep", 1, "--signing-key-file", key_file, "--json")
    assert result.code == 0, result.err
    assert result.json["unreadable"] == [str(newest), str(forged)]
    assert catalog.names(signed.remote) == [newest, CheckpointName(1, 4), forged]


def test_a_drain_by_hand_checks_signatures(spot: Spot, signed: BuiltRun, key_file: Path, tmp_path: Path) -> None:
    """The local folder may have another name where it is mounted: the run is the one of the remote."""
    signed.commit(3)
    local = signed.local.root.rename(tmp_path / "mounted")
    stranger = BuiltRun(local)
    stranger.number = signed.number
    stranger.commit(4)
    result = spot("agent", "--once", "--local", local, "--remote", signed.url, "--signing-key-file", key_file)
    assert result.code == 1 and "000001-000000000004" in result.err
    assert catalog.names(signed.remote) == [CheckpointName(1, 3), CheckpointName(1, 1)]


def test_a_bad_key_file_is_a_wrong_call(spot: Spot, signed: BuiltRun, key_file: Path) -> None:
    key_file.write_text("short-key")
    result = spot("ls", signed.url, "--signing-key-file", key_file)
    assert result.code == 2 and "16 bytes or more" in result.err and "short-key" not in result.err


def test_a_key_file_that_others_can_read_is_told(
    signed: BuiltRun, key_file: Path, spot: Spot, caplog: pytest.LogCaptureFixture
) -> None:
    key_file.chmod(0o644)
    assert spot("verify", signed.url, "--signing-key-file", key_file).code == 0
    assert "can be read by other users" in caplog.text


def test_a_password_in_the_url_is_not_printed(spot: Spot) -> None:
    for command in (["ls"], ["status"], ["verify"], ["restore", "--to", "x"], ["prune"], ["repair", "--from", "y"]):
        result = spot(*command, "sftp://somebody:hidden-value@127.0.0.1:1/run")
        assert result.code in (1, 2) and result.err
        assert "hidden-value" not in result.out + result.err
