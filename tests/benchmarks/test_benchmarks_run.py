"""Benchmarks run from the command line at their tiny size. What they measure here means nothing: no time is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
    result = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-6000:]
    return result.stdout


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
    if trainer == "lightning":
        # ModelCheckpoint stores the frozen base with every checkpoint of adapters.
        assert rows["ModelCheckpoint"]["file_bytes"] > 2 * rows["SpotCallback"]["file_bytes"]


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
