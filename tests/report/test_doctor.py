"""`spot doctor`: what is wrong with this machine is found, told with its fix, and nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spot_core.report.checks import finding
from tests.disk import fill, mounted
from tests.report.conftest import Result, Spot, everything_in, spot_process, start_spot
from tests.report.examined import SMALL_MB, Examine, found, names_in, statuses
from tests.report.stored import BuiltRun

# -- the command -------------------------------------------------------------------------------------------------


def test_a_machine_without_faults_is_ready_and_nothing_is_left_behind(doctor: Examine, tmp_path: Path) -> None:
    result = doctor("--grace-s", 1000)
    assert result.code == 0, result.out
    assert result.json["is_ready"] is True and result.json["problems"] == 0
    assert set(statuses(result, "remote").values()) == {"ok"}
    assert [*dict.fromkeys(area for area, _ in found(result))] == [
        "notices",
        "signals",
        "local tier",
        "remote",
        "clock",
        "grace period",
    ]
    assert names_in(tmp_path) == set()


def test_a_run_in_use_is_left_as_it_is(doctor: Examine, two_tiers: BuiltRun, tmp_path: Path) -> None:
    two_tiers.live(steps=(0, 10))
    two_tiers.commit(10, ballast=1 << 20)
    two_tiers.drain()
    before = everything_in(tmp_path), names_in(tmp_path)
    result = doctor()
    assert result.code == 0, result.out
    assert (everything_in(tmp_path), names_in(tmp_path)) == before


def test_the_newest_checkpoint_tells_how_large_one_is(spot: Spot, two_tiers: BuiltRun, tmp_path: Path) -> None:
    two_tiers.commit(10, ballast=3 << 20)
    two_tiers.drain()

    def state_bytes(local: Path) -> int:
        result = spot("doctor", "--remote", two_tiers.url, "--local", local, "--json")
        return int(found(result)["grace period", "save"]["measured"]["state_bytes"])

    manifest = json.loads(two_tiers.remote.read(f"manifests/{two_tiers.remote.list('manifests')[0]}"))
    wanted = sum(file["bytes"] for file in manifest["files"])
    assert state_bytes(two_tiers.local.root.parent) == wanted
    assert state_bytes(tmp_path / "a new machine") == wanted


def test_the_table_has_marks_and_the_fix_below_what_it_is_for(spot: Spot, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    places = ("--remote", tmp_path / "file" / "run", "--local", tmp_path / "nvme", "--state-mb", SMALL_MB)
    result = spot("doctor", *places)
    assert result.code == 1
    lines = result.out.splitlines()
    (index,) = (index for index, line in enumerate(lines) if line.startswith("✗ list"))
    assert "fix: " in "".join(lines[index + 1 : index + 3])
    assert any(line.startswith("✓ ") for line in lines)
    assert "not ready for a long run" in lines[-1]


def test_a_terminal_that_knows_only_ascii_gets_other_marks(tmp_path: Path) -> None:
    arguments = ("doctor", "--local", tmp_path / "nvme", "--state-mb", SMALL_MB)
    result = spot_process(*arguments, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert result.code == 0, result.err
    assert "ok writing" in result.out and "✓" not in result.out and "? writing" not in result.out


def test_without_a_remote_the_machine_is_checked_all_the_same(spot: Spot, tmp_path: Path) -> None:
    result = spot("doctor", "--local", tmp_path / "nvme", "--json")
    assert result.code == 0
    assert statuses(result, "remote") == {"remote": "skipped"}
    assert statuses(result, "local tier")["writing"] == "ok"
    assert "SPOT_REMOTE" in found(result)["remote", "remote"]["fix"]


def test_places_come_from_the_environment_unless_they_are_given(
    spot: Spot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPOT_REMOTE", str(tmp_path / "theirs" / "run"))
    monkeypatch.setenv("SPOT_LOCAL", str(tmp_path / "disk"))
    result = found(spot("doctor", "--state-mb", SMALL_MB, "--json"))
    assert f"{tmp_path}/theirs/run" in result["remote", "list"]["detail"]
    assert f"{tmp_path}/disk/run" in result["local tier", "folder"]["detail"]
    result = found(spot("doctor", "--remote", tmp_path / "mine" / "run", "--state-mb", SMALL_MB, "--json"))
    assert f"{tmp_path}/mine/run" in result["remote", "list"]["detail"]


def test_the_local_folder_is_the_one_that_a_training_would_choose(
    spot: Spot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spot_core.config.nvme_mount", lambda: None)
    monkeypatch.chdir(tmp_path)
    folder = found(spot("doctor", "--state-mb", SMALL_MB, "--json"))["local tier", "folder"]
    assert f"{tmp_path}/.spot/" in folder["detail"]
    assert "SPOT_LOCAL" in folder["detail"]
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--remote", "s3://bucket"),
        ("--remote", "s4://bucket/run"),
        ("--grace-s", "-1"),
        ("--state-mb", "0"),
        ("--colour",),
    ],
)
def test_a_wrong_call_exits_2(spot: Spot, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert spot("doctor", "--local", tmp_path / "nvme", *arguments).code == 2
    assert names_in(tmp_path) == set()


def test_settings_that_a_training_would_refuse_are_refused(
    spot: Spot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPOT_KEEP_REMOTE", "0")
    result = spot("doctor", "--local", tmp_path / "nvme")
    assert result.code == 2
    assert "keep_remote" in result.err


def test_a_key_file_that_others_can_read_is_told(doctor: Examine, tmp_path: Path) -> None:
    key = tmp_path / "run.key"
    key.write_text("k" * 32)
    key.chmod(0o644)
    told = found(doctor("--signing-key-file", key))["remote", "signing key"]
    assert (told["status"], told["fix"]) == ("warning", "chmod 600 it")
    assert "k" * 32 not in told["detail"]


def test_every_finding_that_is_not_fine_says_what_to_do(doctor: Examine, tmp_path: Path) -> None:
    (tmp_path / "nvme").write_text("in the way")
    result = doctor("--grace-s", 0.001)
    bad = [each for each in found(result).values() if each["status"] in {finding.WARNING, finding.PROBLEM}]
    assert bad and all(each["fix"] for each in bad)


def test_sigterm_in_the_middle_leaves_nothing_behind(tmp_path: Path) -> None:
    arguments = ("--remote", tmp_path / "bucket" / "run", "--local", tmp_path / "nvme", "--state-mb", 500)
    process = start_spot("doctor", *arguments)
    while not list(tmp_path.glob("nvme/run/doctor-*/sample.bin")):
        assert process.poll() is None
        time.sleep(0.005)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + 15
    assert names_in(tmp_path) == set()


# -- the local tier ------------------------------------------------------------------------------------------------


def test_a_read_only_local_folder_is_a_problem(doctor: Examine, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro") as disk:
        result = doctor(local=disk)
    folder = found(result)["local tier", "folder"]
    assert (result.code, folder["status"]) == (1, "problem")
    assert "Read-only file system" in folder["detail"]
    assert "SPOT_LOCAL" in folder["fix"]
    assert statuses(result, "remote")["delete"] == "ok", "the remote is tried all the same"


def test_a_file_in_the_place_of_the_local_folder_is_a_problem(doctor: Examine, tmp_path: Path) -> None:
    (tmp_path / "nvme").write_text("in the way")
    result = doctor()
    assert (result.code, statuses(result, "local tier")) == (1, {"folder": "problem"})
    assert names_in(tmp_path) == {"nvme"}


def test_a_disk_without_room_for_three_checkpoints_is_told_and_not_filled(doctor: Examine, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=8m") as disk:
        result = doctor("--state-mb", 3, local=disk)
        assert (result.code, statuses(result, "local tier")["room"]) == (0, "warning")
        fill(disk / "filler", leave_bytes=1 << 20)
        result = doctor("--state-mb", 3, local=disk)
        assert (result.code, statuses(result, "local tier")["room"]) == (1, "problem")
        assert statuses(result, "local tier")["writing"] == "skipped"
        assert statuses(result, "remote")["upload"] == "skipped"
        assert statuses(result, "grace period")["save"] == "skipped"
        assert "free 8" in found(result)["local tier", "room"]["fix"]
        assert names_in(disk) == {"filler"}


def test_what_the_run_holds_counts_as_room(doctor: Examine, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=8m") as disk:
        run = BuiltRun(disk / "alpaca")
        for step in (10, 20):
            run.commit(step, ballast=2_000_000)
        result = doctor("--state-mb", 2.2, local=disk)
    assert statuses(result, "local tier")["room"] == "ok"


def test_a_local_tier_in_memory_is_told(doctor: Examine, tmp_path: Path) -> None:
    with mounted(tmp_path / "memory", "size=64m") as memory:
        told = found(doctor(local=memory))["local tier", "file system"]
    assert told["status"] == "warning"
    assert "in memory (tmpfs)" in told["detail"]


def test_both_tiers_on_one_volume_are_told(doctor: Examine) -> None:
    told = found(doctor())["local tier", "file system"]
    assert (told["status"], told["detail"]) == (
        "warning",
        "local and remote tier are on one volume: losing it loses both",
    )


def test_a_network_file_system_is_told_with_its_fix_apart(doctor: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spot_core.store.volume.file_system", lambda folder: "lustre")
    told = found(doctor(remote="memory://bucket/alpaca"))["local tier", "file system"]
    assert told["status"] == "warning"
    assert "network file system (lustre)" in told["detail"]
    assert told["fix"] == "set local= (SPOT_LOCAL) to a disk of this instance"


def test_the_speed_of_the_disk_is_measured(doctor: Examine) -> None:
    assert found(doctor())["local tier", "writing"]["measured"]["write_bytes_per_s"] > 0


# -- signals -------------------------------------------------------------------------------------------------------


def shelled(script: str, folder: Path, *wrapper: str) -> Result:
    """What doctor tells when `script` starts it, in which SPOT is its command."""
    command = f"{sys.executable} -m spot_core.report.cli doctor --state-mb {SMALL_MB} --json"
    environment = {**os.environ, "SPOT_LOCAL": f"{folder}/nvme"}
    arguments = [*wrapper, "sh", "-c", script.replace("SPOT", command)]
    process = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=environment)
    return Result(process.returncode, process.stdout, process.stderr)


def test_a_shell_that_keeps_a_signal_to_itself_is_named(tmp_path: Path) -> None:
    told = found(shelled("SPOT; true", tmp_path))["signals", "shells above"]
    assert told["status"] == "warning"
    assert "`sh -c " in told["detail"]
    assert "SIGTERM that is sent to the shell alone does not reach what it runs" in told["detail"]
    assert "exec" in told["fix"]


def test_a_secret_on_the_command_line_above_is_not_repeated(tmp_path: Path) -> None:
    assert "hunter2" not in shelled("SECRET=hunter2; SPOT; true", tmp_path).out


@pytest.mark.parametrize("script", ["exec SPOT", "trap 'kill -TERM $!' TERM; SPOT; true"])
def test_a_shell_that_is_gone_or_forwards_is_not(script: str, tmp_path: Path) -> None:
    assert "`sh -c " not in found(shelled(script, tmp_path))["signals", "shells above"]["detail"]


def test_a_shell_as_the_first_process_of_a_container_is_named(tmp_path: Path) -> None:
    inside = ("unshare", "--pid", "--fork", "--mount-proc")
    if subprocess.run([*inside, "true"], capture_output=True).returncode != 0:
        pytest.skip("a namespace of its own needs root")
    told = found(shelled("SPOT; true", tmp_path, *inside))["signals", "first process"]
    assert told["status"] == "warning"
    assert "the first process is a shell, `sh -c " in told["detail"]
    assert "tini" in told["fix"] and "exec" in told["fix"]
    told = found(shelled("exec SPOT", tmp_path, *inside))["signals", "first process"]
    assert told["status"] == "ok"


def test_an_ignored_signal_is_told(tmp_path: Path) -> None:
    told = found(shelled("trap '' TERM; exec SPOT", tmp_path))["signals", "delivery"]
    assert told["status"] == "warning"
    assert "SIGTERM is ignored" in told["detail"]


def test_a_blocked_signal_is_a_problem_and_so_are_the_configured_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPOT_SIGNALS", "SIGTERM,SIGUSR1")
    block = "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]); "
    result = shelled(f'{sys.executable} -c "{block} os.execv(sys.argv[1], sys.argv[1:])" SPOT', tmp_path)
    told = found(result)["signals", "delivery"]
    assert (result.code, told["status"]) == (1, "problem")
    assert "SIGUSR1 is blocked" in told["detail"]


def test_torchrun_above_is_told_by_what_it_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOT_GRACE_S", "60")
    monkeypatch.setenv("SPOT_SIGNALS", "SIGTERM,SIGUSR1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launcher = f"{sys.executable} -m torch.distributed.run --nproc-per-node 1 --no-python SPOT"
    result = shelled(launcher, tmp_path)
    told = [each for each in result.json["findings"] if each["what"] == "torchrun"]
    assert [each["status"] for each in told] == ["warning", "warning"]
    assert "kills its workers 30s after a signal, grace_s is 60" in told[0]["detail"]
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=60" in told[0]["fix"]
    assert "SIGUSR1" in told[1]["detail"] and "SIGTERM" not in told[1]["detail"]
    assert ("signals", "torchrun") not in found(shelled("exec SPOT", tmp_path))
