"""Benchmarks run from the command line at their tiny size. What they measure here means nothing: no time is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EVERY_TRAINER = {"SpotCallback", "SpotCallback, no checkpoint", "torch.save, fsync", "memcpy"}
STALL_SAVERS = {
    "hf": {
        *EVERY_TRAINER,
        "spot_core",
        "DCP async_save",
        "DCP async_save, stager reused",
        "Trainer._save_checkpoint",
    },
    "lightning": {*EVERY_TRAINER, "ModelCheckpoint", "ModelCheckpoint, AsyncCheckpointIO"},
}
WRITE_NOTHING = {"SpotCallback, no checkpoint", "memcpy"}


def run(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    # Threads that wait for each other would take minutes where other tests use the cores.
    plain = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=240, env=plain)
    assert result.returncode == 0, result.stderr[-6000:]
    return result.stdout


def _assert_drawn(figures: Path, *, comparisons: int) -> None:
    picture = figures.with_suffix(".png")
    run("plot.py", str(figures), "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG") and len(pyplot.imread(picture)) > 100 * comparisons


@pytest.mark.parametrize("trainer", STALL_SAVERS)
def test_stall_measures_every_saver_and_leaves_nothing_behind(trainer: str, tmp_path: Path) -> None:
    """One round of the tiny size gives each saver a positive row, in the table and in the JSON."""
    checkpoints, figures = tmp_path / "checkpoints", tmp_path / "stall.json"
    checkpoints.mkdir()
    arguments = ["--trainer", trainer, "--size", "tiny", "--repeat", "1"]
    table = run("stall.py", *arguments, "--json", str(figures), "--folder", str(checkpoints))
    [result] = json.loads(figures.read_text())["results"]
    rows = {row["saver"]: row for row in result["rows"]}
    assert rows.keys() == STALL_SAVERS[trainer]
    assert all(saver in table for saver in rows)
    for row in rows.values():
        assert 0 < row["shortest_s"] <= row["stall_s"] <= row["longest_s"]
        assert row["next_step"] > 0
        assert (row["file_bytes"] == 0) == (row["saver"] in WRITE_NOTHING)
    assert result["tensors"] > 100
    assert result["bytes"] > 0
    assert not list(checkpoints.iterdir())
    _assert_drawn(figures, comparisons=1)
    if trainer == "lightning":
        # ModelCheckpoint stores the frozen base with every checkpoint of adapters.
        assert rows["ModelCheckpoint"]["file_bytes"] > 2 * rows["SpotCallback"]["file_bytes"]


def test_figures_without_a_comparison_are_refused(tmp_path: Path) -> None:
    figures, picture = tmp_path / "outage.json", tmp_path / "picture.png"
    figures.write_text('{"results": [{"rows": []}]}')
    command = [sys.executable, "plot.py", str(figures), "--plot", str(picture)]
    result = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "Nothing was written" in result.stderr
    assert not picture.exists()


def test_outage_measures_every_network_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """One short turn of each: a row in the table and in the JSON, and the faults struck."""
    work, figures = tmp_path / "work", tmp_path / "outage.json"
    work.mkdir()
    arguments = ["--step", "fixed", "--seconds", "1", "--repeat", "1", "--interval", "0.2"]
    table = run("outage.py", *arguments, "--json", str(figures), "--folder", str(work))
    [result] = json.loads(figures.read_text())["results"]
    rows = {row["fault"]: row for row in result["rows"]}
    assert len(rows) == 7
    assert all(fault in table for fault in rows)
    assert all(row["ratio"] > 0 for row in rows.values())
    struck = {fault for fault, row in rows.items() if row["spoiled"]}
    assert {"remote down", "SlowDown"} <= struck
    assert not struck & {"none", "50 KB/s uplink"}
    assert not list(work.iterdir())


STORAGE_WAYS = {
    "local commit": {
        "CheckpointWriter",
        "os.write, fsync",
        "os.write, sync_file_range, fsync",
        "torch.save, fsync",
        "safetensors.save_file, fsync",
    },
    "drain": {"Drain, verified", "Drain's upload alone", "boto3, read back"},
    "restore": {"restore, verified"},
}
STORAGE_CLIENTS = {"one plain HTTP request a file", "boto3", "boto3's CRT", "obstore", "s5cmd", "aws s3 cp"}


def test_storage_measures_every_way_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """One round of the tiny size: commit, drain and restore beside the clients that are installed, agent, selection."""
    work, figures = tmp_path / "work", tmp_path / "storage.json"
    work.mkdir()
    arguments = ["--size", "tiny", "--repeat", "1"]
    text = run("storage.py", *arguments, "--json", str(figures), "--folder", str(work))
    commit, drain, restore, agent, selection = json.loads(figures.read_text())["results"]
    for result in (commit, drain, restore):
        rows = {row["way"]: row for row in result["rows"]}
        wanted = STORAGE_WAYS[result["what"]]
        assert rows.keys() - {"obstore, read back"} == (wanted if result is commit else wanted | STORAGE_CLIENTS)
        assert all(way in text for way in rows)
        assert wanted | (set() if result is commit else {"boto3"}) <= {way for way in rows if not rows[way]["absent"]}
        for row in rows.values():
            assert row["absent"] or 0 < row["shortest_s"] <= row["seconds"] <= row["longest_s"]
        assert result["files"] == 2 and result["bytes"] > 0
    assert [row["what"] for row in agent["rows"]] == ["drains", "restores"]
    assert all(row["peak_bytes"] > 0 for row in agent["rows"])
    assert selection["manifests"] == 1200
    looks = {row["what"]: row for row in selection["rows"]}
    # 1,200 names are two pages. Choosing takes the first one, the lives, and what is newer than they tell.
    assert looks["names, S3"]["lists"] == 2
    assert looks["the newest of S3, with its download"]["lists"] == 3
    assert not list(work.iterdir())
    _assert_drawn(figures, comparisons=3)


@pytest.mark.parametrize("trainer", STALL_SAVERS)
def test_steady_measures_speed_and_memory_and_leaves_nothing_behind(trainer: str, tmp_path: Path) -> None:
    """Two short turns and a few saves: step rates, memory of both processes, in the table and in the JSON."""
    work, figures = tmp_path / "work", tmp_path / "steady.json"
    work.mkdir()
    arguments = ["--trainer", trainer, "--size", "tiny", "--seconds", "0.5", "--repeat", "2", "--saves", "12"]
    table = run("steady.py", *arguments, "--json", str(figures), "--folder", str(work))
    [result] = json.loads(figures.read_text())["results"]
    assert 0 < result["lowest"] <= result["ratio"] <= result["highest"]
    assert result["steps_per_s"] > 0 and result["bytes"] > 0
    assert {row["process"] for row in result["memory"]} == {"trainer", "agent"}
    for row in result["memory"]:
        assert row["process"] in table
        assert 0 < row["settled"] <= row["most"] and row["end"] <= row["most"] <= row["most_during"]
    assert not list(work.iterdir())


# Each start is a process that imports a trainer: those that differ most, one under each.
STARTS = {"hf": "local tier", "lightning": "remote, S3"}


@pytest.mark.parametrize("trainer", STARTS)
def test_relaunch_measures_a_start_and_leaves_nothing_behind(trainer: str, tmp_path: Path) -> None:
    """One round of the tiny size: each start gets as far as its first step, a row in the table and in the JSON."""
    work, figures = tmp_path / "work", tmp_path / "relaunch.json"
    work.mkdir()
    arguments = ["--trainer", trainer, "--size", "tiny", "--repeat", "1", "--only", STARTS[trainer]]
    table = run("relaunch.py", *arguments, "--json", str(figures), "--folder", str(work))
    [result] = json.loads(figures.read_text())["results"]
    rows = {row["start"]: row for row in result["rows"]}
    assert rows.keys() == {"no callback", STARTS[trainer]}
    assert result["bytes"] > 0
    for row in rows.values():
        assert row["start"] in table
        assert 0 < row["call_s"] < row["start_s"] and row["ratio"] > 0
    assert not list(work.iterdir())


GOODPUT_POLICIES = {
    "adaptive",
    "fixed-500-steps",
    "fixed-600s",
    "fixed-1800s",
    "fixed-3600s",
    "budget-3.5%",
    "young-daly-oracle",
    "best-fixed-hindsight",
    "knows-every-death",
}


def test_goodput_replays_a_folder_of_lives_under_every_policy(tmp_path: Path) -> None:
    """A file of lives that all last two hours: what each policy keeps is known."""
    lives = [f"slot,{nth * 10000},7200,0" for nth in range(4)]
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "even.csv").write_text("\n".join(["series,start_s,lifetime_s,censored", *lives]) + "\n")
    arguments = ["--traces", str(tmp_path / "traces"), "--size", "tiny", "--lives", "4", "--plots", str(tmp_path)]
    table = run("goodput.py", *arguments, "--json", str(tmp_path / "goodput.json"))
    rows = [row for row in json.loads((tmp_path / "goodput.json").read_text()) if row["trace"] == "even"]
    assert "even" in table and {row["policy"] for row in rows} == GOODPUT_POLICIES
    assert {row["slowdown"] for row in rows} == {0.0, 0.1}

    def kept(policy: str, **wanted: float) -> dict[str, float]:
        setting = {
            "stall_s": 1.0,
            "upload_s": 20.0,
            "restart_s": 30.0,
            "announced": 0.0,
            "lead_s": 30.0,
            "slowdown": 0.0,
        }
        (row,) = (row for row in rows if row["policy"] == policy and (setting | wanted).items() <= row.items())
        return row

    # Restores for 30 s; of 7170 s 14 periods of 501 s end 20 s before the death at 7200 s.
    assert kept("fixed-500-steps")["goodput"] == pytest.approx(14 * 500 / 7200)
    assert kept("fixed-500-steps")["lost_s_per_preemption"] == pytest.approx(7170 - 14 * 501)
    assert kept("knows-every-death")["goodput"] == pytest.approx((7200 - 30 - 21) / 7200)
    for row in rows:
        best = kept(
            "best-fixed-hindsight",
            **{name: row[name] for name in row.keys() - {"trace", "policy", "goodput", "lost_s_per_preemption"}},
        )
        if row["policy"] not in {"adaptive", "knows-every-death"}:
            assert row["goodput"] <= best["goodput"] + 1e-9
        assert 0.0 < row["goodput"] < 1.0
    assert kept("adaptive", announced=0.9)["goodput"] >= kept("adaptive")["goodput"]
    assert all((tmp_path / picture).read_bytes().startswith(b"\x89PNG") for picture in ("goodput.png", "interval.png"))


def test_goodput_says_what_is_wrong_with_a_folder_without_lives(tmp_path: Path) -> None:
    command = [sys.executable, "goodput.py", "--traces", str(tmp_path)]
    result = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=240)
    assert result.returncode == 2 and "has no CSV files of lives" in result.stderr
