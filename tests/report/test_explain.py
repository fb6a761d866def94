"""`spot explain`: why the next checkpoint is due when it is, from what a life has recorded."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spot_core.agent import lives
from spot_core.agent.journal import Journal
from spot_core.agent.lives import Life
from spot_core.cadence.cadence import Cadence
from spot_core.cadence.hazard import End, Evidence, LifeSpan
from spot_core.cadence.interval import Costs, Limits
from spot_core.cadence.record import CadenceRecord
from spot_core.report import explain, places
from spot_core.report.explain import ExplainView
from spot_core.report.units import duration
from spot_core.store import catalog, layout
from spot_core.store.posix import PosixTier
from tests.agent.processes import eventually
from tests.report.conftest import Spot, spot_process
from tests.report.stored import BuiltRun

ROOT = Path(__file__).resolve().parents[2]
HOUR = 3600.0
COSTS = Costs(stall_s=2.0, upload_s=60.0, idle_step_s=0.5, busy_step_s=0.625)  # a fifth of the speed for a minute
COST_S = 2.0 + 0.2 * 60.0
LOSSES = Evidence.of([LifeSpan(HOUR, End.LOST)] * 3)


def cadence(**more: Any) -> Cadence:
    return Cadence(**{"evidence": LOSSES, "costs": COSTS, "began_s": 600.0, **more})


def recorded(age_s: float = 1200.0, since_s: float = 30.0, **more: Any) -> CadenceRecord:
    return CadenceRecord(cadence(**more), age_s, since_s, 0.0)


def live(run: BuiltRun, outcome: str = lives.RUNNING, record: CadenceRecord | Any = None, **more: Any) -> Life:
    """A life on this boot of this instance, whose last heartbeat, now, is of the moment of the record."""
    run.live(outcome)
    body = record.to_json() if isinstance(record, CadenceRecord) else record
    now = time.time()
    fields = {"instance": "i-1", "began_s": 600.0, "lived_s": 600.0, "started": now - 600.0, "heartbeat": now, **more}
    life = replace(Life.from_json(run.remote.read(layout.life(run.number))), cadence=body, **fields)
    for tier in (run.local, run.remote):
        tier.replace(layout.life(run.number), json.dumps(json.loads(life.to_json())).encode())
    return life


def asked(run: BuiltRun, local: Path | None = None, *, later_s: float = 0.0) -> ExplainView:
    return explain.explain(places.open_run(run.url, {}), local, now=time.time() + later_s)


# -- numbers and words -------------------------------------------------------------------------------------------


def test_the_interval_follows_from_the_numbers_beside_it(spot: Spot, two_tiers: BuiltRun) -> None:
    live(two_tiers, record=recorded())
    view = spot("explain", two_tiers.url, "--json").json

    assert view["cost_s"] == pytest.approx(COST_S)
    assert view["best_s"] == pytest.approx(math.sqrt(2 * COST_S * HOUR / view["unrescued_per_hour"]), rel=1e-3)
    assert (view["interval_s"], view["bound"]) == (view["best_s"], "")
    assert view["at_twice_s"] == pytest.approx(view["best_s"] / math.sqrt(2), rel=1e-3)
    assert view["at_half_s"] == pytest.approx(view["best_s"] * math.sqrt(2), rel=1e-3)
    assert view["interval_steps"] == round(view["interval_s"] / 0.5)
    assert view["low_per_hour"] < view["losses_per_hour"] < view["high_per_hour"]
    unrescued = view["losses_per_hour"] * (1 - view["rescued"]) + view["crashes_per_hour"]
    assert view["unrescued_per_hour"] == pytest.approx(unrescued)

    out = spot("explain", two_tiers.url).out
    for name, words in {
        "interval": f"{duration(view['interval_s'])} of training, about {view['interval_steps']:,} steps",
        "since the last one": "30s when this was recorded",
        "this instance": "20m old",
        "losses expected": f"one every {duration(HOUR / view['losses_per_hour'])} (90 %: ",
        "crashes expected": f"one every {duration(HOUR / view['crashes_per_hour'])}",
        "a checkpoint costs": "14s: a stall of 2s, and 20.0% of the speed lost during an upload of 60s",
        "best without bounds": f"√(2 × 14s × {duration(HOUR / view['unrescued_per_hour'])}) = ",
        "if twice as often": duration(view["at_twice_s"]),
        "if half as often": duration(view["at_half_s"]),
    }.items():
        assert line_of(out, name).startswith(words), name
    assert out.startswith("alpaca, life 1, running\n")
    assert "held" not in out and "fleet" not in out and "known end" not in out


def line_of(out: str, name: str) -> str:
    """What the table says beside a name."""
    (line,) = (line for line in out.splitlines() if line.startswith(name))
    return line.removeprefix(name).strip()


def test_the_keys_of_the_json_carry_their_units(spot: Spot, two_tiers: BuiltRun) -> None:
    live(two_tiers, record=recorded(walls_s=(5000.0,)))
    view = spot("explain", two_tiers.url, "--json").json
    words = {"run": "alpaca", "incarnation": 1, "outcome": "running", "bound": ""}
    assert {name: view.pop(name) for name in words} == words
    assert view.pop("lives") == {"lost": 0, "rescued": 0, "crashed": 0, "quiet": 0}
    assert view.pop("can_rescue") is False
    assert view.pop("walls_in_s") == pytest.approx([3800.0], abs=30)
    shares_and_counts = {"rescued", "slowdown", "fleet_losses", "fleet_hours", "interval_steps"}
    assert all(name.endswith(("_s", "_per_hour")) for name in view.keys() - shares_and_counts)
    assert all(type(value) in {int, float} for value in view.values())
    assert len(view) == 22, "a key is added, never renamed or removed"


@pytest.mark.parametrize(
    ("more", "bound", "words"),
    [
        ({"costs": replace(COSTS, idle_step_s=5000.0, busy_step_s=None)}, "one step", "at the length of a step"),
        ({"costs": replace(COSTS, upload_s=9000.0, busy_step_s=None)}, "upload", "at what an upload takes"),
        ({"limits": Limits(most_overhead=0.001)}, "max_overhead", "by max_overhead"),
        ({"limits": Limits(shortest_s=3000.0)}, "min_interval_s", "by min_interval_s"),
        ({"limits": Limits(longest_s=20.0)}, "max_interval_s", "by max_interval_s"),
        ({"limits": Limits(pinned_s=60.0)}, "interval_s", "by interval_s, which pins it"),
        ({"limits": Limits(pinned_steps=50)}, "interval_steps", "by interval_steps, which pins it"),
    ],
)
def test_the_bound_that_holds_is_named(
    spot: Spot, two_tiers: BuiltRun, more: dict[str, Any], bound: str, words: str
) -> None:
    live(two_tiers, record=recorded(**more))
    view = spot("explain", two_tiers.url, "--json").json
    assert view["bound"] == bound
    assert view["interval_s"] != view["best_s"]
    assert view["at_twice_s"] == view["at_half_s"] == view["interval_s"]
    assert f"held {words}" in spot("explain", two_tiers.url).out


def test_an_interval_pinned_to_steps_is_told_in_steps(spot: Spot, two_tiers: BuiltRun) -> None:
    live(two_tiers, record=recorded(limits=Limits(pinned_steps=50)))
    assert asked(two_tiers).interval_steps == 50
    assert line_of(spot("explain", two_tiers.url).out, "interval") == "25s of training, about 50 steps"


def test_what_was_not_measured_yet_is_not_told(spot: Spot, two_tiers: BuiltRun) -> None:
    live(two_tiers, record=recorded(costs=Costs(guessed_stall_s=3.0)))
    view = spot("explain", two_tiers.url, "--json").json
    assert (view["upload_s"], view["interval_steps"], view["stall_s"]) == (None, None, 3.0)
    out = spot("explain", two_tiers.url).out
    assert "3s: a stall of 3s, and no upload measured yet" in out and "about" not in line_of(out, "interval")


@pytest.mark.parametrize(("lead_s", "words"), [(120.0, "% ("), (60.0, "not counted on: ")])
def test_a_notice_counts_where_it_leaves_the_time_that_a_rescue_takes(
    spot: Spot, two_tiers: BuiltRun, lead_s: float, words: str
) -> None:
    live(two_tiers, record=recorded(lead_s=lead_s))
    view = asked(two_tiers)
    assert view.can_rescue is (lead_s == 120.0)
    assert (view.rescued > 0) is view.can_rescue
    line = line_of(spot("explain", two_tiers.url).out, "rescued by a notice")
    assert words in line and f"a rescue takes 69s, a notice comes {duration(lead_s)} before" in line


def test_known_ends_that_are_still_to_come_are_told(spot: Spot, two_tiers: BuiltRun) -> None:
    live(two_tiers, record=recorded(walls_s=(900.0, 1200.0 + 7200.0)))
    out = spot("explain", two_tiers.url).out
    assert line_of(out, "known end") == "in 2h 00m: a checkpoint is durable right before", (
        "and not the one that has passed"
    )


def test_what_the_fleet_taught_is_told(spot: Spot, two_tiers: BuiltRun) -> None:
    live(two_tiers, record=recorded(fleet=Evidence.of([LifeSpan(2 * HOUR, End.QUIET), LifeSpan(HOUR, End.LOST)])))
    view = asked(two_tiers)
    assert view.fleet_losses == 1.0 and 2.7 < view.fleet_hours < 3.0
    line = line_of(spot("explain", two_tiers.url).out, "the fleet's lives")
    assert line.startswith("1.0 losses in 2h 5") and line.endswith("count besides the run's own")


# -- the lives before --------------------------------------------------------------------------------------------


def test_the_first_life_says_that_it_expects_what_is_usual(spot: Spot, two_tiers: BuiltRun) -> None:
    live(two_tiers, record=recorded())
    assert line_of(spot("explain", two_tiers.url).out, "lives before") == "none: these are what is usual here"


def test_the_lives_before_are_counted_by_how_they_ended(spot: Spot, two_tiers: BuiltRun) -> None:
    live(two_tiers, lives.RUNNING, boot_id="another boot")
    live(two_tiers, lives.RUNNING)  # the next life is on the same boot
    live(two_tiers, lives.DIED)
    live(two_tiers, lives.PREEMPTED, newest_durable="000004-000000000000")
    live(two_tiers, lives.STOPPED)
    live(two_tiers, record=recorded())
    view = spot("explain", two_tiers.url, "--json").json
    assert view["lives"] == {"lost": 1, "rescued": 1, "crashed": 2, "quiet": 1}
    assert (view["incarnation"], view["lived_s"]) == (6, 3000.0)
    assert line_of(spot("explain", two_tiers.url).out, "lives before") == (
        "1 lost with their instance, 1 rescued by a notice, 2 crashed, 1 ended by themselves; 50m in all"
    )


# -- which moment ------------------------------------------------------------------------------------------------


def test_a_running_life_is_asked_at_its_present_age(two_tiers: BuiltRun) -> None:
    """Quiet time lengthens the interval by itself, also since the last heartbeat."""
    live(two_tiers, record=recorded())
    first, later = asked(two_tiers), asked(two_tiers, later_s=150.0)
    assert later.age_s - first.age_s == pytest.approx(150.0, abs=20.0)
    assert first.age_s == pytest.approx(1200.0, abs=20.0)
    assert later.interval_s > first.interval_s
    assert later.losses_per_hour < first.losses_per_hour


def test_a_running_life_has_aged_since_its_last_checkpoint(two_tiers: BuiltRun) -> None:
    """The record of the cadence is of the last checkpoint, the life's of the last minute."""
    live(two_tiers, record=recorded(), lived_s=3 * HOUR)
    old = asked(two_tiers)
    assert old.age_s == pytest.approx(600.0 + 3 * HOUR, abs=20.0)
    assert old.interval_s > recorded().decision().interval_s


@pytest.mark.parametrize("outcome", [lives.COMPLETED, lives.DIED])
def test_a_life_that_has_ended_does_not_grow_older(spot: Spot, two_tiers: BuiltRun, outcome: str) -> None:
    live(two_tiers, outcome, recorded())
    first, later = asked(two_tiers), asked(two_tiers, later_s=100 * HOUR)
    assert first == later
    assert (first.outcome, first.age_s) == (outcome, 1200.0)
    assert spot("explain", two_tiers.url).out.startswith(f"alpaca, life 1, {outcome}\n")


def test_a_life_that_vanished_does_not_grow_older(two_tiers: BuiltRun) -> None:
    live(two_tiers, record=recorded())
    first, later = asked(two_tiers, later_s=HOUR), asked(two_tiers, later_s=100 * HOUR)
    assert first == later
    assert (first.outcome, first.age_s) == ("lost", 1200.0)


def test_a_clock_that_is_behind_makes_no_life_younger(two_tiers: BuiltRun) -> None:
    live(two_tiers, record=recorded(), lived_s=1000.0)
    assert asked(two_tiers, later_s=-HOUR).age_s == 1600.0


# -- records that are missing or hostile -------------------------------------------------------------------------


@pytest.mark.parametrize("lived", [0, 2])
def test_a_run_that_recorded_nothing_says_what_to_do(spot: Spot, two_tiers: BuiltRun, lived: int) -> None:
    for _ in range(lived):
        live(two_tiers)
    result = spot("explain", two_tiers.url)
    assert (result.code, result.out) == (2, "")
    assert "has recorded why it checkpoints when it does" in result.err and "ask again then" in result.err


DAMAGED: dict[str, Any] = {
    "nothing": None,
    "empty": {},
    "other": {"age_s": "x"},
    "no cost": {**recorded().to_json(), "costs": {"stall_s": -1}},
    "a huge number": {**recorded().to_json(), "age_s": 10**400},
    "no prior": {**recorded().to_json(), "prior_per_hour": 0},
    "no bound": {**recorded().to_json(), "limits": {"longest_s": None}},
    "no numbers": {**recorded().to_json(), "evidence": {"losses": [[]]}},
    "nested": {"limits": {"limits": {"limits": {}}}},
}


@pytest.mark.parametrize("which", DAMAGED)
def test_a_damaged_record_leaves_that_of_an_older_life(spot: Spot, two_tiers: BuiltRun, which: str) -> None:
    live(two_tiers, lives.DIED, recorded(since_s=11.0))
    live(two_tiers, lives.RUNNING, DAMAGED[which])
    view = spot("explain", two_tiers.url, "--json").json
    assert (view["incarnation"], view["since_s"], view["lived_s"]) == (1, 11.0, 0.0)


@pytest.mark.parametrize(
    "more",
    [
        {"began_s": 1e300},
        {"began_s": -1e300},
        {"lived_s": 1e300},
        {"lived_s": None, "heartbeat": 1e300, "started": -1e300},
        {"heartbeat": -1e300},
        {"host": "\x1b[31m[red]", "pool": "../../etc"},
    ],
    ids=lambda more: ", ".join(f"{name}={value!r:.9}" for name, value in more.items()),
)
def test_a_life_of_absurd_times_is_still_explained(spot: Spot, two_tiers: BuiltRun, more: dict[str, Any]) -> None:
    live(two_tiers, record=recorded(), **more)
    assert spot("explain", two_tiers.url).code == 0
    view = spot("explain", two_tiers.url, "--json").json
    assert 0 < view["interval_s"] <= 4 * HOUR


def test_records_of_other_lives_that_cannot_be_read_are_left_out(spot: Spot, two_tiers: BuiltRun) -> None:
    two_tiers.remote.replace(layout.life(two_tiers.claim()), b"{")
    live(two_tiers, record=recorded())
    assert spot("explain", two_tiers.url, "--json").json["incarnation"] == 2


# -- the folder on this host -------------------------------------------------------------------------------------


def test_the_local_folder_is_fresher_than_the_remote(spot: Spot, two_tiers: BuiltRun) -> None:
    live(two_tiers, record=recorded(since_s=1.0))
    Journal(two_tiers.local.root, 1).write_cadence(recorded(since_s=2.0).to_json())
    for local in (two_tiers.local.root, two_tiers.local.root.parent):
        assert spot("explain", two_tiers.url, "--local", local, "--json").json["since_s"] == 2.0
    assert spot("explain", two_tiers.url, "--json").json["since_s"] == 1.0


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b'{"age_s": NaN}'])
def test_a_damaged_local_record_leaves_what_the_remote_knows(spot: Spot, two_tiers: BuiltRun, damage: bytes) -> None:
    live(two_tiers, record=recorded(since_s=1.0))
    Journal(two_tiers.local.root, 1).write_cadence({})
    (two_tiers.local.root / layout.JOURNAL / "000001.cadence.json").write_bytes(damage)
    result = spot("explain", two_tiers.url, "--local", two_tiers.local.root, "--json")
    assert result.json["since_s"] == 1.0


def test_a_host_that_knows_only_older_lives_adds_nothing(spot: Spot, two_tiers: BuiltRun) -> None:
    live(two_tiers, lives.DIED)
    live(two_tiers, record=recorded(since_s=1.0))
    Journal(two_tiers.local.root, 1).write_cadence(recorded(since_s=2.0).to_json())
    view = spot("explain", two_tiers.url, "--local", two_tiers.local.root, "--json").json
    assert (view["incarnation"], view["since_s"]) == (2, 1.0)


def test_the_local_folder_of_another_run_is_refused(spot: Spot, two_tiers: BuiltRun, tmp_path: Path) -> None:
    live(two_tiers, record=recorded())
    other = BuiltRun(tmp_path / "other" / "alpaca")
    result = spot("explain", two_tiers.url, "--local", other.local.root)
    assert (result.code, result.out) == (2, "") and "belongs to another run" in result.err


def test_a_local_folder_without_a_run_is_refused(spot: Spot, two_tiers: BuiltRun, tmp_path: Path) -> None:
    live(two_tiers, record=recorded())
    result = spot("explain", two_tiers.url, "--local", tmp_path)
    assert (result.code, result.out) == (2, "") and "no local copy of run alpaca" in result.err


def test_nothing_is_written(spot: Spot, two_tiers: BuiltRun, tmp_path: Path) -> None:
    live(two_tiers, record=recorded())
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    spot("explain", two_tiers.url, "--local", two_tiers.local.root)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


# -- a real training ---------------------------------------------------------------------------------------------


@contextmanager
def training(remote: Path, local: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`examples/raw_pytorch.py`, killed in the end."""
    script = [sys.executable, str(ROOT / "examples/raw_pytorch.py"), "--remote", str(remote), "--local", str(local)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(log, "ab") as out, subprocess.Popen(script, stdout=out, stderr=out, env=environment) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def outcome_of(tier: PosixTier, number: int) -> str:
    try:
        return Life.from_json(tier.read(layout.life(number))).outcome
    except FileNotFoundError:
        return ""


def test_a_real_training_that_is_killed_is_explained_and_its_crash_counts(tmp_path: Path) -> None:
    remote, log = PosixTier(tmp_path / "bucket" / "raw"), tmp_path / "log"
    local = tmp_path / "nvme"
    for number in (1, 2):
        with training(remote.root, local, log) as process:
            eventually(
                lambda number=number: any(name.incarnation == number for name in catalog.names(remote)),  # type: ignore[misc]
                "a checkpoint is durable",
            )
            assert process.poll() is None, log.read_text()
        eventually(lambda number=number: outcome_of(remote, number) == lives.DIED, "its agent has ended it")  # type: ignore[misc]
        for where in ([], ["--local", local]):
            result = spot_process("explain", remote.root, *where, "--json")
            assert (result.code, result.err) == (0, "")
            view = result.json
            assert (view["incarnation"], view["outcome"]) == (number, lives.DIED)
            assert view["lives"] == {"lost": 0, "rescued": 0, "crashed": number - 1, "quiet": 0}
            assert view["interval_s"] >= 1.0 and view["age_s"] > 0
            out = spot_process("explain", remote.root, *where, COLUMNS="160").out
            assert ("1 crashed" in out) == (number == 2)
