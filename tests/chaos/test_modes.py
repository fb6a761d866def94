"""`spot chaos` in its modes: announced, withdrawn and signalled ends, traces, crashes and lost instances, for real."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from spot_core.chaos.metadata_servers import GcpServer
from spot_core.chaos.plan import Mode, Notice, PlannedKill, ages_in_trace, drawn_ages, planned
from spot_core.chaos.runner import rehearse
from spot_core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
POLITE = [sys.executable, str(ROOT / "tests/chaos/polite.py")]
TRACE = """source,series,lifetime_s,censored
x,node1,100,0
x,node2,50,1
x,node2,30,0
x,node1,200,0
x,node3,70,1
"""
# Far more than anything here takes: what waits for it has failed.
LONG_S = 3600.0


@dataclass
class Rehearsed:
    """What `spot chaos --json` said. lives: of its report."""

    code: int
    lives: list[dict[str, Any]]
    err: str

    @property
    def endings(self) -> list[str]:
        return [life["ending"] for life in self.lives]


def spot_chaos(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "spot_core.report.cli", "chaos", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
    )


def chaos(*options: str, command: list[str], **environ: str) -> Rehearsed:
    done = spot_chaos("--json", *options, "--", *command, **environ)
    lines = done.stdout.splitlines()
    return Rehearsed(done.returncode, json.loads(lines[-1])["lives"] if lines else [], done.stderr)


def instances(folder: Path) -> list[str]:
    """Which instance each life of polite.py saw, as far as it lived to look."""
    return (folder / "instances").read_text().splitlines()


# -- notices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ["aws", "gcp", "azure"])
def test_who_hears_the_notice_leaves_before_the_deadline_and_goes_on_elsewhere(tmp_path: Path, provider: str) -> None:
    command = [*POLITE, str(tmp_path), "--lives", "2"]
    found = chaos("--kill-every", "0.5", "--lives", "2", "--notice", f"{provider}:3600", command=command)
    assert (found.code, found.endings) == (0, ["preempted", "preempted", "finished"]), found.err
    for life in found.lives[:2]:
        assert life["exit_code"] == 75
        assert 0 < life["left_s"] < life["notice_s"]
    assert found.lives[2]["notice_s"] is None
    assert len(set(instances(tmp_path))) == 3, "each life runs on an instance of its own"
    assert found.err.count(f"spot: {provider}: preemption announced") == 2


def test_a_preempted_run_may_have_an_exit_code_of_its_own(tmp_path: Path) -> None:
    """Chaos and the training are told by the same variable."""
    options = ["--kill-every", "0.5", "--lives", "1", "--notice", "aws:3600"]
    found = chaos(*options, command=[*POLITE, str(tmp_path)], SPOT_PREEMPT_EXIT_CODE="99")
    assert (found.code, found.endings) == (0, ["preempted", "finished"]), found.err
    assert found.lives[0]["exit_code"] == 99


@pytest.mark.parametrize("provider", ["aws", "gcp", "azure"])
def test_who_does_not_hear_it_is_killed_at_the_deadline(tmp_path: Path, provider: str) -> None:
    command = [*POLITE, str(tmp_path), "--rude"]
    found = chaos("--kill-every", "0.5", "--lives", "1", "--notice", f"{provider}:2", command=command)
    assert (found.code, found.endings) == (0, ["killed", "finished"]), found.err
    killed = found.lives[0]
    assert (killed["exit_code"], killed["left_s"]) == (-9, None)
    assert killed["lived_s"] >= killed["notice_s"] >= 1


def test_a_notice_that_is_withdrawn_kills_nothing_and_a_kill_comes_later(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("series,lifetime_s,censored\na,12,0\na,1,0\n")
    command = [*POLITE, str(tmp_path), "--until-withdrawn"]
    options = ["--trace", str(tmp_path / "trace.csv"), "--notice", "gcp:12", "--withdraw"]
    found = chaos(*options, command=command)
    assert (found.code, found.endings) == (0, ["notice withdrawn, killed", "finished"]), found.err
    assert (tmp_path / "withdrawn").exists(), "the command saw it and went on"
    killed = found.lives[0]
    assert (killed["is_withdrawn"], killed["left_s"], killed["exit_code"]) == (True, None, -9)
    assert found.err.index("announced") < found.err.index("withdrawn")
    assert len(set(instances(tmp_path))) == 2


def test_who_leaves_before_the_withdrawal_keeps_the_instance(tmp_path: Path) -> None:
    kill = PlannedKill(notice_at_s=0.2, lead_s=2 * LONG_S, withdrawn_at_s=LONG_S, kill_at_s=2 * LONG_S)
    with GcpServer() as server:
        report = rehearse([*POLITE, str(tmp_path)], kills=[kill], server=server)
    assert [life.ending for life in report.lives] == ["preempted", "finished"]
    assert not report.lives[0].is_withdrawn and report.lives[0].left_s
    assert server.documents[server.instance]["preempted"] == "FALSE"
    assert len(set(instances(tmp_path))) == 1


HANDLES = """
import signal, sys, time
from pathlib import Path
lives = Path(sys.argv[1])
lives.write_text(lives.read_text() + "x" if lives.exists() else "x")
if len(lives.read_text()) == 2:
    sys.exit(0)
signal.signal(signal.SIGTERM, {handler})
lives.with_suffix(".ready").touch()
time.sleep(3600)
"""


@pytest.mark.parametrize(
    ("handler", "ending", "code"),
    [
        ("lambda *_: sys.exit(75)", "preempted", 75),
        ("signal.SIG_DFL", "preempted", -15),
        ("signal.SIG_IGN", "killed", -9),
        ("lambda *_: sys.exit(3)", "failed", 3),
    ],
)
def test_a_signal_is_a_notice_too(tmp_path: Path, handler: str, ending: str, code: int) -> None:
    lead_s = 2.0 if code == -9 else LONG_S
    kill = PlannedKill(notice_at_s=3.0, lead_s=lead_s, kill_at_s=3.0 + lead_s)
    report = rehearse([sys.executable, "-c", HANDLES.format(handler=handler), str(tmp_path / "lives")], kills=[kill])
    first = report.lives[0]
    assert (first.ending, first.exit_code) == (ending, code)
    assert (tmp_path / "lives.ready").exists()
    assert first.notice_s == pytest.approx(lead_s, abs=1.0)
    assert (first.left_s is None) == (code == -9)
    if code == 3:
        assert report.failed_code == 3
    else:
        assert [life.ending for life in report.lives[1:]] == ["finished"]


def test_the_table_shows_what_a_notice_was_worth(tmp_path: Path) -> None:
    command = [*POLITE, str(tmp_path)]
    done = spot_chaos("--kill-every", "0.5", "--notice", "gcp:600", "--", *command, COLUMNS="160")
    assert done.returncode == 0, done.stderr
    assert "notice s" in done.stdout and "left s before" in done.stdout and "exit" in done.stdout


# -- what a kill takes ---------------------------------------------------------------------------------------------

FAMILY = """
import os, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
if (folder / "pids").exists():
    sys.exit(0)
same = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
apart = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
(folder / "pids").write_text(f"{same.pid} {apart.pid}")
time.sleep(3600)
"""


@pytest.mark.parametrize(
    ("mode", "ending", "survives"),
    [
        (Mode.KILL, "killed", (False, True)),
        (Mode.CRASH, "trainer killed", (True, True)),
        (Mode.INSTANCE, "killed, local tier wiped", (False, False)),
    ],
)
def test_a_kill_takes_what_its_mode_says(tmp_path: Path, mode: Mode, ending: str, survives: tuple[bool, bool]) -> None:
    run_folder = tmp_path / "nvme" / "run"
    run_folder.mkdir(parents=True)
    report = rehearse(
        [sys.executable, "-c", FAMILY, str(tmp_path)],
        kills=planned(drawn_ages(4.0, random.Random(1)), most=1, mode=mode),
        run_folder=run_folder if mode is Mode.INSTANCE else None,
    )
    family = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    try:
        assert [life.ending for life in report.lives] == [ending, "finished"]
        assert tuple(is_running(pid) for pid in family) == survives
        assert run_folder.exists() == (mode is not Mode.INSTANCE)
    finally:
        for pid in family:
            if is_running(pid):
                os.kill(pid, 9)


LEAVES = """
import signal, subprocess, sys, time
from pathlib import Path
pid = Path(sys.argv[1])
if pid.exists():
    sys.exit(0)
drain = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({sys.argv[2]})"], start_new_session=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
pid.write_text(str(drain.pid))
time.sleep(3600)
"""


@pytest.mark.parametrize(("drain_s", "lead_s"), [(4.0, LONG_S), (LONG_S, 4.0)])
def test_what_a_leaving_command_leaves_behind_has_until_the_deadline(
    tmp_path: Path, drain_s: float, lead_s: float
) -> None:
    run_folder = tmp_path / "nvme" / "run"
    run_folder.mkdir(parents=True)
    kill = PlannedKill(notice_at_s=2.0, lead_s=lead_s, kill_at_s=2.0 + lead_s, mode=Mode.INSTANCE)
    command = [sys.executable, "-c", LEAVES, str(tmp_path / "pid"), str(drain_s)]
    report = rehearse(command, kills=[kill], run_folder=run_folder)
    assert [life.ending for life in report.lives] == ["preempted, local tier wiped", "finished"]
    assert report.lives[0].left_s
    assert not is_running(int((tmp_path / "pid").read_text()))
    assert not run_folder.exists()


def is_running(pid: int) -> bool:
    """Whether it runs, a moment after it may have been killed."""
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            return False
        time.sleep(0.05)
    return True


STEADY = [sys.executable, "tests/chaos/steady.py"]


def killed_once(folder: Path, mode: str, launcher: list[str]) -> tuple[Rehearsed, Path]:
    """A training in two lives, the first of which got somewhere, and its remote. A slow start takes another try."""
    for mean_s in (8, 16, 32):
        bucket, steps = folder / f"bucket-{mean_s}" / "steady", 300 * mean_s
        places = ["--remote", str(bucket), "--local", str(folder / "nvme" / str(mean_s))]
        options = ["--kill-every", str(mean_s), "--lives", "1", "--mode", mode, "--seed", "3", *places]
        found = chaos(*options, command=[*launcher, *STEADY, str(steps)], SPOT_INTERVAL_S="0.3", SPOT_OVERFLOW="")
        assert found.code == 0, found.err
        if found.lives[0]["step"] and found.lives[1]["resumed_step"]:
            return found, bucket
    raise AssertionError("no life got far enough")


def test_a_crash_takes_the_trainer_behind_its_launcher_and_leaves_the_agent(tmp_path: Path) -> None:
    found, bucket = killed_once(tmp_path, "crash", ["sh", "-c", '"$@"; exit $?', "launcher"])
    assert found.endings == ["trainer killed", "finished"]
    assert found.lives[0]["exit_code"] == 137, "the launcher saw it"
    first = min((bucket / "lives").iterdir())
    assert json.loads(first.read_text())["outcome"] == "died", "the agent lived to say so"


def test_a_lost_instance_continues_from_the_remote(tmp_path: Path) -> None:
    found, _ = killed_once(tmp_path, "instance", [])
    assert found.endings == ["killed, local tier wiped", "finished"]
    assert 0 < found.lives[1]["resumed_step"] <= found.lives[0]["step"]


# -- plans ---------------------------------------------------------------------------------------------------------


def test_a_command_that_cannot_start_is_a_wrong_call() -> None:
    found = chaos("--kill-every", "1", command=["/no/such/command"])
    assert found.code == 2 and "/no/such/command" in found.err and "Traceback" not in found.err


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    (tmp_path / "trace.csv").write_text(TRACE)
    return tmp_path / "trace.csv"


def test_a_trace_kills_at_its_ages_and_counts_quiet_time(trace: Path) -> None:
    assert ages_in_trace(trace) == [100.0, 80.0, 200.0]
    assert ages_in_trace(trace, "node1") == [100.0, 200.0]
    assert ages_in_trace(trace, "node2") == [80.0]


@pytest.mark.parametrize(
    ("text", "series", "said"),
    [
        (TRACE, "node9", "no series 'node9'; it has 3, such as node1, node2, node3"),
        (TRACE, "node3", "no life of 'node3' was ended"),
        ("lifetime_s,series\n1,a\n", None, "no column censored"),
        ("", None, "no column lifetime_s, censored, series"),
        ("lifetime_s,censored,series\n1,0,a\nsoon,0,a\n", None, "line 3: lifetime_s must be"),
        ("lifetime_s,censored,series\n1,maybe,a\n", None, "line 2: .*censored 0 or 1"),
        ("lifetime_s,censored,series\n-1,0,a\n", None, "line 2"),
        ("lifetime_s,censored,series\n1\n", None, "line 2"),
    ],
)
def test_a_trace_that_is_none_is_refused(tmp_path: Path, text: str, series: str | None, said: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        ages_in_trace(file, series)


def test_a_trace_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        ages_in_trace(tmp_path / "nowhere.csv")


def test_a_trace_runs_to_its_end_in_scaled_time(tmp_path: Path, trace: Path) -> None:
    command = [*POLITE, str(tmp_path), "--rude", "--lives", "2"]
    options = ["--trace", str(trace), "--series", "node1", "--time-scale", "0.015"]
    found = chaos(*options, command=command)
    assert (found.code, found.endings) == (0, ["killed", "killed", "finished"]), found.err
    assert found.lives[0]["lived_s"] >= 1.5 and found.lives[1]["lived_s"] >= 3.0


def test_a_notice_comes_before_the_end_or_at_once() -> None:
    first, second = planned([100.0, 20.0], most=None, notice=Notice("aws", 30.0))
    assert (first.notice_at_s, first.lead_s, first.kill_at_s) == (70.0, 30.0, 100.0)
    assert (second.notice_at_s, second.lead_s, second.kill_at_s) == (0.0, 20.0, 20.0)


def test_a_withdrawn_notice_takes_two_ages() -> None:
    (only,) = planned([100.0, 50.0, 10.0], most=None, notice=Notice("aws", 30.0), is_withdrawn=True)
    assert (only.notice_at_s, only.withdrawn_at_s, only.kill_at_s) == (70.0, 85.0, 150.0)


def test_a_wiped_kill_takes_the_instance_whatever_the_mode() -> None:
    kills = planned([1.0] * 3, most=2, mode=Mode.CRASH, wipes={2})
    assert [kill.mode for kill in kills] == [Mode.CRASH, Mode.INSTANCE]


def test_moments_are_drawn_around_the_mean_and_repeat_with_the_seed() -> None:
    one, other = (planned(drawn_ages(10.0, random.Random(7)), most=50) for _ in range(2))
    assert one == other
    assert all(5.0 <= kill.kill_at_s <= 15.0 for kill in one)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--kill-every", "0"],
        ["--kill-every", "1", "--trace", "x.csv"],
        ["--kill-every", "1", "--series", "node1"],
        ["--kill-every", "1", "--time-scale", "0"],
        ["--kill-every", "1", "--lives", "-1"],
        ["--kill-every", "1", "--notice", "aws"],
        ["--kill-every", "1", "--notice", "oracle:30"],
        ["--kill-every", "1", "--notice", "aws:-1"],
        ["--kill-every", "1", "--notice", "aws:nan"],
        ["--kill-every", "1", "--withdraw"],
        ["--kill-every", "1", "--withdraw", "--notice", "signal:30"],
        ["--kill-every", "1", "--mode", "instance"],
        ["--kill-every", "1", "--mode", "reboot"],
    ],
)
def test_a_wrong_call_runs_nothing(tmp_path: Path, options: list[str]) -> None:
    found = chaos(*options, command=["touch", str(tmp_path / "ran")], SPOT_REMOTE="", SPOT_LOCAL="")
    assert found.code == 2 and "Traceback" not in found.err, found.err
    assert not (tmp_path / "ran").exists()
