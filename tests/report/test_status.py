"""`spot status`: how one run stands, and what its instance would lose if it vanished now."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spot_core.agent import lives
from spot_core.agent.journal import AgentStatus, Journal, Progress
from spot_core.environment import STORAGE_OPTIONS
from spot_core.report.places import address
from spot_core.store import incarnation, layout, retention
from spot_core.store.layout import CheckpointName
from spot_core.store.tier import open_tier
from tests.report.conftest import Spot
from tests.report.stored import FACTS, BuiltRun
from tests.servers import S3Server, free_port, s3_options


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


# -- a remote that cannot be read ------------------------------------------------------------------------------


@pytest.fixture
def cut_off(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuiltRun:
    """A life that trains through an outage: step 100 is durable, 110 and 120 are not, and nothing listens now."""
    remote = open_tier(f"s3://{s3_server.new_bucket()}/team/alpaca", s3_server.options)
    run = BuiltRun(tmp_path / "nvme" / "alpaca", remote)
    run.live(steps=(0, 100))
    durable = run.commit(100, useful_s=50)
    run.drain()
    run.commit(110, useful_s=55)
    run.commit(120, useful_s=60)
    journal = Journal(run.local.root, run.number)
    journal.open_progress(Progress(125, 62.5, 0))
    status = AgentStatus(newest_durable=str(durable), durable=[str(durable)])
    status.failures, status.last_failure = 3, "connection refused"
    journal.write_status(status)
    monkeypatch.setenv(STORAGE_OPTIONS, json.dumps(s3_options(free_port())))
    return run


def test_without_the_remote_the_local_folder_shows_what_this_host_knows(spot: Spot, cut_off: BuiltRun) -> None:
    shown = spot("status", cut_off.url, "--local", cut_off.local.root)
    result = spot("status", cut_off.url, "--local", cut_off.local.root, "--json")
    view, here = result.json, result.json["local"]

    assert (shown.code, result.code) == (3, 3)
    assert (view["run"], view["url"], view["facts"]) == ("alpaca", cut_off.url, FACTS)
    assert "Could not connect" in view["remote_error"]
    assert view["newest_durable"]["step"] == 100 and view["goodput"] is None
    assert [name.partition("-")[2] for name in here["undrained"]] == ["000000000120", "000000000110"]
    assert (here["step"], here["gap_steps"], here["gap_s"]) == (125, 25, 12.5)
    assert (here["agent"]["failures"], here["agent"]["is_alive"]) == (3, False)
    assert [life["step"] for life in view["lives"]] == [125]
    told = [line for line in shown.out.splitlines() if "the remote cannot be read" in line]
    assert len(told) == 1 and "Could not connect" in told[0]
    assert "25 steps, 12s of training since the durable one" in shown.out
    assert "2 checkpoints" in shown.out and "connection refused" in shown.out


def test_where_no_copy_of_the_durable_one_is_left_only_its_step_is_known(spot: Spot, cut_off: BuiltRun) -> None:
    retention.delete_checkpoints(cut_off.local, [CheckpointName(1, 100)])
    here = spot("status", cut_off.url, "--local", cut_off.local.root, "--json").json["local"]
    assert (here["gap_steps"], here["gap_s"], len(here["undrained"])) == (25, None, 2)
    out = spot("status", cut_off.url, "--local", cut_off.local.root).out
    assert "25 steps since the durable one" in out
    assert "step 100, checkpoint 000001-000000000100" in out
    assert "useful time" not in out


def test_what_an_agent_of_a_life_before_knew_to_be_durable_counts(spot: Spot, cut_off: BuiltRun) -> None:
    """The agent of a life that began right before the outage may not have seen the remote yet."""
    number = incarnation.newest(cut_off.local) + 1
    cut_off.local.create(layout.incarnation(number), cut_off.local.read(layout.incarnation(1)))
    journal = Journal(cut_off.local.root, number)
    journal.open_progress(Progress(130, 65.0, 120))
    journal.write_status(AgentStatus(failures=1))
    here = spot("status", cut_off.url, "--local", cut_off.local.root, "--json").json["local"]
    assert (here["incarnation"], here["gap_steps"], here["gap_s"]) == (number, 30, 15.0)


def test_without_any_agent_nothing_is_known_to_be_durable(spot: Spot, cut_off: BuiltRun) -> None:
    cut_off.local.delete([layout.JOURNAL])
    result = spot("status", cut_off.url, "--local", cut_off.local.root)
    assert result.code == 3 and "none that is known here" in result.out
    assert spot("status", cut_off.url, "--local", cut_off.local.root, "--json").json["newest_durable"] is None


def test_without_the_remote_and_a_local_folder_the_error_names_the_option(spot: Spot, cut_off: BuiltRun) -> None:
    result = spot("status", cut_off.url)
    assert (result.code, result.out) == (1, "")
    assert "Could not connect" in result.err and "--local DIR" in result.err


def test_without_the_remote_a_folder_without_the_run_is_refused(spot: Spot, cut_off: BuiltRun, tmp_path: Path) -> None:
    result = spot("status", cut_off.url, "--local", tmp_path)
    assert result.code == 2 and "no local copy of run alpaca" in result.err


@pytest.mark.parametrize("url", ["s3://bucket/run", "{folder}/run", "file://{folder}/run/"])
def test_the_address_of_a_tier_is_known_without_reaching_it(url: str, tmp_path: Path) -> None:
    url = url.format(folder=tmp_path)
    assert address(url) == open_tier(url, s3_options(free_port())).url
