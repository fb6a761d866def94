"""`spot ls`: runs under a root, checkpoints of a run, and a clear word where there is neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from spot_core.agent import lives
from spot_core.errors import TierDeniedError
from spot_core.store import layout
from spot_core.store.posix import PosixTier
from tests.report.conftest import Spot
from tests.report.stored import BuiltRun


def test_a_root_lists_every_run_with_its_newest_step_size_and_outcome(spot: Spot, tmp_path: Path) -> None:
    alpaca = BuiltRun(tmp_path / "alpaca")
    alpaca.live(lives.PREEMPTED, ended_s_ago=500, steps=(0, 20))
    alpaca.commit(10, age_s=560)
    alpaca.commit(20, age_s=520)
    done = BuiltRun(tmp_path / "done", framework="lightning")
    done.live(lives.COMPLETED, steps=(0, 7))
    done.complete(done.commit(7))
    (tmp_path / "notes.txt").write_text("not a run")
    (tmp_path / "empty").mkdir()

    listed = spot("ls", tmp_path, "--json").json["runs"]

    assert [run["run"] for run in listed] == ["alpaca", "done"]
    assert [run["framework"] for run in listed] == ["transformers", "lightning"]
    assert [(run["newest_step"], run["checkpoints"], run["outcome"]) for run in listed] == [
        (20, 2, "preempted"),
        (7, 1, "completed"),
    ]
    assert [run["is_complete"] for run in listed] == [False, True]
    assert 500 <= listed[0]["heartbeat_age_s"] < 600
    stored = sum(file.stat().st_size for file in (tmp_path / "alpaca" / "checkpoints").rglob("*") if file.is_file())
    assert listed[0]["size_bytes"] == stored
    table = spot("ls", tmp_path).out
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["alpaca", "done"]


def test_a_run_lists_its_checkpoints_newest_first(spot: Spot, run: BuiltRun) -> None:
    run.claim()
    best = run.commit(10, age_s=300, epoch=0.25)
    run.commit(20, pins=best)
    run.claim()
    last = run.commit(15, age_s=60, notes=("world size 2 -> 1",))
    run.complete(last)

    listed = spot("ls", run.url, "--json").json
    table = spot("ls", run.url).out

    assert listed["run"] == "alpaca"
    rows = listed["checkpoints"]
    assert [row["name"] for row in rows] == ["000002-000000000015", "000001-000000000020", "000001-000000000010"]
    assert [row["is_complete"] for row in rows] == [True, False, False]
    assert [row["pins"] for row in rows] == [None, str(best), None]
    assert rows[2]["epoch"] == 0.25
    assert rows[2]["files"] == 5
    assert 300 <= rows[2]["age_s"] < 400
    lines = table.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == [row["name"] for row in rows]
    assert "training ended" in lines[2] and "not bit-exact" in lines[2]
    assert "pins step 10" in lines[3]
    assert lines[4].rstrip().endswith("pinned")
    assert "not bit-exact: world size 2 -> 1" in table


def test_the_keys_of_json_stay(spot: Spot, run: BuiltRun) -> None:
    run.live()
    run.commit(1)

    (checkpoint,) = spot("ls", run.url, "--json").json["checkpoints"]
    (row,) = spot("ls", Path(run.url).parent, "--json").json["runs"]

    assert set(checkpoint) >= {
        "name", "incarnation", "step", "epoch", "created_unix_s", "age_s", "useful_s", "size_bytes", "files",
        "native", "pins", "is_complete", "notes", "error",
    }  # fmt: skip
    assert set(row) >= {
        "run", "url", "framework", "newest_step", "checkpoints", "size_bytes", "is_complete", "heartbeat_unix_s",
        "heartbeat_age_s", "outcome", "error",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("outcome", "age_s", "shown"),
    [
        (lives.RUNNING, 0.0, "running"),
        (lives.RUNNING, 170.0, "running"),
        (lives.RUNNING, 190.0, "lost"),
        (lives.PREEMPTED, 190.0, "preempted"),
        (lives.COMPLETED, 190.0, "completed"),
    ],
)
def test_a_life_that_says_running_without_heartbeats_is_lost(
    spot: Spot, run: BuiltRun, outcome: str, age_s: float, shown: str
) -> None:
    run.live(outcome, ended_s_ago=age_s)
    (row,) = spot("ls", Path(run.url).parent, "--json").json["runs"]
    assert row["outcome"] == shown


def test_a_damaged_run_is_named_and_hides_no_other(spot: Spot, run: BuiltRun, tmp_path: Path) -> None:
    run.live()
    run.commit(3)
    bad = tmp_path / "runs" / "bad"
    bad.mkdir()
    (bad / layout.RUN).write_text("{")

    result = spot("ls", tmp_path / "runs")

    assert result.code == 0
    assert "bad: " in result.out and "is damaged" in result.out
    assert "alpaca" in result.out and "running" in result.out


def test_a_folder_that_may_not_be_read_hides_no_run(spot: Spot, run: BuiltRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.commit(3)
    Path(run.url).with_name("lost+found").mkdir()
    read = PosixTier.read

    def guarded(tier: PosixTier, path: str) -> bytes:
        if tier.url.endswith("lost+found"):
            raise TierDeniedError(13, "permission denied")
        return read(tier, path)

    monkeypatch.setattr(PosixTier, "read", guarded)
    assert [row["run"] for row in spot("ls", Path(run.url).parent, "--json").json["runs"]] == ["alpaca"]


def test_a_damaged_manifest_is_a_row_that_says_so(spot: Spot, run: BuiltRun) -> None:
    run.commit(3)
    name = run.commit(4)
    run.local.path(layout.manifest(name)).write_bytes(b"torn")

    result = spot("ls", run.url)

    assert result.code == 0
    assert f"manifest {name} is damaged" in result.out
    assert "000001-000000000003" in result.out


def test_a_checkpoint_pruned_while_listing_is_left_out(
    spot: Spot, run: BuiltRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, pruned = run.commit(4), run.commit(3)
    run.local.path(layout.manifest(pruned)).unlink()
    monkeypatch.setattr("spot_core.store.catalog.names", lambda tier: [kept, pruned])
    assert [row["step"] for row in spot("ls", run.url, "--json").json["checkpoints"]] == [4]


def test_a_place_without_a_run_says_what_is_there(spot: Spot, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    (tmp_path / "teams").mkdir()

    result = spot("ls", tmp_path)

    assert result.code == 2
    assert result.out == ""
    assert f"{tmp_path} holds no run" in result.err
    assert "holiday.jpg, teams" in result.err


def test_a_place_with_many_entries_names_only_some(spot: Spot, tmp_path: Path) -> None:
    for number in range(25):
        (tmp_path / f"entry-{number:02d}").touch()
    assert "entry-09 and 15 more" in spot("ls", tmp_path).err


@pytest.mark.parametrize("command", ["ls", "status", "verify"])
def test_a_place_that_does_not_exist_is_a_wrong_call(spot: Spot, tmp_path: Path, command: str) -> None:
    result = spot(command, tmp_path / "nowhere")
    assert result.code == 2
    assert "is empty or does not exist" in result.err


def test_a_file_is_a_wrong_call(spot: Spot, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = spot("ls", tmp_path / "file")
    assert result.code == 2
    assert "is a file" in result.err


def test_a_place_inside_a_run_points_at_the_run(spot: Spot, run: BuiltRun) -> None:
    run.commit(1)
    result = spot("ls", f"{run.url}/checkpoints")
    assert result.code == 2
    assert f"Did you mean {run.url}?" in result.err


def test_a_command_for_one_run_names_the_runs_of_a_root(spot: Spot, run: BuiltRun) -> None:
    result = spot("status", Path(run.url).parent)
    assert result.code == 2
    assert f"such as {run.url}" in result.err


@pytest.mark.parametrize("width", [80, 120])
def test_rows_fit_the_terminal_and_lose_nothing(
    spot: Spot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    run = BuiltRun(tmp_path / "llama-8b-lora-alpaca")
    run.live(lives.PREEMPTED, steps=(0, 123_456), lasted_s=80_000, host="ip-10-0-12-231.eu-west-1.compute.internal")
    run.complete(run.commit(123_456, age_s=100_000, epoch=12.5))

    root, listed = spot("ls", tmp_path).out, spot("ls", run.url).out
    status = spot("status", run.url).out

    for line in [*root.splitlines(), *listed.splitlines(), *status.splitlines()[8:]]:
        assert len(line) <= width, line
        assert "…" not in line
    assert "llama-8b-lora-alpaca" in root and "preempted" in root and "123,456" in root
    assert "000001-000000123456" in listed and "training ended" in listed
    assert "ip-10-0-12-231" in status and "0 → 123,456" in status and "preempted" in status
