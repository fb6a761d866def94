"""`spot status`: how one run stands, and what its instance would lose if it vanished now."""

from __future__ import annotations

from pathlib import Path

from spot_core.agent import lives
from spot_core.agent.journal import AgentStatus, Journal, Progress
from spot_core.store import layout
from tests.report.conftest import Spot
from tests.report.stored import FACTS, BuiltRun


def test_status_names_the_run_and_its_facts(spot: Spot, run: BuiltRun) -> None:
    view = spot("status", run.url, "--json").json
    assert (view["run"], view["framework"], view["facts"]) == ("alpaca", "transformers", FACTS)
    assert view["run_id"]
    out = spot("status", run.url).out
    assert "LlamaForCausalLM" in out
    assert "no life has reported yet" in out
    assert "no checkpoint yet" in out


def test_every_life_is_shown_with_how_it_ended_and_what_it_gained(spot: Spot, run: BuiltRun) -> None:
    run.live(lives.RUNNING, ended_s_ago=7000, lasted_s=3600, steps=(0, 120), host="first.example.com")
    run.live(lives.PREEMPTED, ended_s_ago=2000, lasted_s=1800, steps=(100, 150))
    run.live(lives.RUNNING, lasted_s=600, steps=(150, 170))

    shown = spot("status", run.url, "--json").json["lives"]

    assert [life["outcome"] for life in shown] == ["lost", "preempted", "running"]
    assert [(life["resumed_step"], life["step"], life["steps"]) for life in shown] == [
        (0, 120, 120),
        (100, 150, 50),
        (150, 170, 20),
    ]
    assert [round(life["duration_s"]) for life in shown] == [3600, 1800, 600]
    assert shown[0]["host"] == "first.example.com"
    out = spot("status", run.url).out
    assert "100 → 150" in out and "+50" in out
    assert "3 lives: 1 lost, 1 preempted, 1 running" in out


def test_goodput_is_useful_time_of_the_newest_checkpoint_over_the_time_of_all_lives(spot: Spot, run: BuiltRun) -> None:
    run.live(lives.RUNNING, ended_s_ago=5000, lasted_s=300)
    run.commit(10, useful_s=150, age_s=5100)
    run.live(lives.RUNNING, lasted_s=200)
    run.commit(20, useful_s=400)

    view = spot("status", run.url, "--json").json

    assert view["useful_s"] == 400
    assert round(view["lives_duration_s"]) == 500
    assert round(view["goodput"], 3) == 0.8
    assert "80.0%" in spot("status", run.url).out


def test_a_running_life_lasts_until_now_whatever_its_last_heartbeat_says(spot: Spot, run: BuiltRun) -> None:
    """Heartbeats are a minute apart: goodput would be above 100 % in the first minute of a run."""
    run.live(lives.RUNNING, ended_s_ago=50, lasted_s=1, steps=(0, 0))
    run.commit(30, useful_s=40)
    view = spot("status", run.url, "--json").json
    assert 51 <= view["lives"][0]["duration_s"] < 80
    assert view["lives"][0]["step"] == 30
    assert 0.5 < view["goodput"] <= 40 / 51


def test_a_checkpoint_is_a_sign_of_life(spot: Spot, run: BuiltRun) -> None:
    run.live(lives.RUNNING, ended_s_ago=1000, lasted_s=100)
    run.commit(30, age_s=20)
    assert spot("status", run.url, "--json").json["lives"][0]["outcome"] == "running"


def test_a_lost_life_lasted_until_its_last_sign(spot: Spot, run: BuiltRun) -> None:
    run.live(lives.RUNNING, ended_s_ago=1000, lasted_s=100)
    run.commit(30, age_s=950)
    (life,) = spot("status", run.url, "--json").json["lives"]
    assert life["outcome"] == "lost"
    assert 149 < life["duration_s"] < 151


def test_the_newest_checkpoint_is_shown_with_its_age(spot: Spot, run: BuiltRun) -> None:
    run.live()
    run.commit(10, age_s=500)
    last = run.commit(1200, age_s=240)
    out = spot("status", run.url).out
    assert "step 1,200, 4m ago" in out
    assert str(last) in out
    assert "training ended" not in out
    run.complete(last)
    assert "training ended here" in spot("status", run.url).out


def test_a_damaged_newest_manifest_is_reported_beside_the_one_that_counts(spot: Spot, run: BuiltRun) -> None:
    run.commit(10)
    name = run.commit(20)
    run.local.path(layout.manifest(name)).write_bytes(b"{}")
    result = spot("status", run.url)
    assert "step 10," in result.out
    assert f"manifest {name} is damaged" in result.out


def test_a_claim_without_a_record_is_shown(spot: Spot, run: BuiltRun) -> None:
    run.claim()
    run.live()
    view = spot("status", run.url, "--json").json
    assert view["claims_without_record"] == [1]
    assert [life["incarnation"] for life in view["lives"]] == [2]


def test_many_lives_show_the_newest_and_say_how_many_came_before(spot: Spot, run: BuiltRun) -> None:
    for number in range(20):
        run.live(lives.PREEMPTED, ended_s_ago=3600, steps=(number, number + 1))
    result = spot("status", run.url)
    assert "19 → 20" in result.out
    assert "5 lives before them" in result.out
    assert " 0 → 1 " not in result.out
    assert len(spot("status", run.url, "--json").json["lives"]) == 20


def test_the_local_folder_shows_what_has_not_been_drained(spot: Spot, two_tiers: BuiltRun) -> None:
    run = two_tiers
    run.live()
    run.commit(100, useful_s=50)
    run.drain()
    waiting = [run.commit(110, useful_s=55), run.commit(120, useful_s=60)]
    journal = Journal(run.local.root, run.number)
    journal.open_progress(Progress(125, 62.5, 0))
    failure = "cannot write s3://bucket: connection refused"
    status = AgentStatus(draining=str(waiting[1]), done_bytes=5_000_000, total_bytes=9_000_000)
    status.failures, status.last_failure = 3, failure
    journal.write_status(status)

    view = spot("status", run.url, "--local", run.local.root, "--json").json["local"]
    out = spot("status", run.url, "--local", run.local.root).out

    assert view["undrained"] == [str(waiting[1]), str(waiting[0])]
    assert view["undrained_bytes"] > 0
    assert (view["step"], view["gap_steps"], view["gap_s"]) == (125, 25, 12.5)
    assert "0 → 125" in out  # the journal is ahead of the heartbeat
    assert view["agent"]["failures"] == 3
    assert view["agent"]["is_alive"] is False
    assert "2 checkpoints" in out and str(waiting[0]) in out
    assert "25 steps, 12s of training" in out
    assert "not running, was draining" in out
    assert "5.0 MB of 9.0 MB" in out and "3 failures" in out and failure in out


def test_a_drained_local_folder_has_nothing_at_risk(spot: Spot, two_tiers: BuiltRun) -> None:
    two_tiers.live()
    two_tiers.commit(100)
    two_tiers.drain()
    result = spot("status", two_tiers.url, "--local", two_tiers.local.root)
    assert "all that is committed here is durable" in result.out
    assert spot("status", two_tiers.url, "--local", two_tiers.local.root, "--json").json["local"]["undrained"] == []


def test_the_folder_above_serves_as_local_too(spot: Spot, two_tiers: BuiltRun) -> None:
    two_tiers.commit(100)
    view = spot("status", two_tiers.url, "--local", two_tiers.local.root.parent, "--json").json
    assert view["local"]["folder"] == str(two_tiers.local.root)


def test_the_local_folder_of_another_run_is_refused(spot: Spot, two_tiers: BuiltRun, tmp_path: Path) -> None:
    other = BuiltRun(tmp_path / "other" / "alpaca")
    result = spot("status", two_tiers.url, "--local", other.local.root)
    assert result.code == 2
    assert "belongs to another run" in result.err


def test_a_local_folder_without_a_run_is_refused(spot: Spot, two_tiers: BuiltRun, tmp_path: Path) -> None:
    result = spot("status", two_tiers.url, "--local", tmp_path)
    assert result.code == 2
    assert "no local copy of run alpaca" in result.err
