"""What a life's record says to the cadence: how it ended, how long it lived, and what no record may say."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from typing import Any

import pytest

from spot_core.agent import lives
from spot_core.agent.lives import Life, end_of, read_lives, spans_of
from spot_core.cadence.hazard import End, Evidence
from spot_core.store import layout
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier

HERE = {"boot_id": "boot", "instance": "i-1"}
DAY = 86_400.0
LIFE = Life(
    incarnation=1,
    host="node",
    boot_id="boot",
    started=1000.0,
    heartbeat=1600.0,
    step=10,
    useful_s=500.0,
    newest_durable=str(CheckpointName(1, 10)),
    instance="i-1",
    pool="aws/us-east-1/us-east-1a/g5.xlarge",
    began_s=90.0,
    lived_s=601.5,
    cadence={"age_s": 1.0},
)


def ends(*history: Life, boot_id: str = "boot", instance: str = "i-1") -> list[End]:
    return [span.end for span in spans_of(history, boot_id=boot_id, instance=instance)]


# -- how a life ended --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("next_life", "end"),
    [
        ({"boot_id": "another boot", "instance": "i-2"}, End.LOST),
        ({"boot_id": "another boot", "instance": "i-1"}, End.LOST),  # stopped, and started again
        ({"boot_id": "boot", "instance": "i-2"}, End.LOST),  # a container, or a job that was requeued on its node
        ({"boot_id": "boot", "instance": "i-1"}, End.CRASHED),
    ],
)
def test_a_life_that_nobody_ended_was_lost_unless_the_next_one_is_on_the_same_boot_and_instance(
    next_life: dict[str, Any], end: End
) -> None:
    assert ends(LIFE, **next_life) == [end]
    assert ends(LIFE, replace(LIFE, incarnation=2, outcome=lives.STOPPED, **next_life))[0] == end


@pytest.mark.parametrize(("boot_id", "end"), [("boot", End.CRASHED), ("another boot", End.LOST)])
def test_records_of_an_older_release_are_compared_by_their_boot(boot_id: str, end: End) -> None:
    old = {
        name: value for name, value in asdict(LIFE).items() if name not in {"instance", "pool", "began_s", "lived_s"}
    }
    life = Life.from_json(json.dumps(old).encode())
    assert life.instance == ""
    assert ends(life, boot_id=boot_id) == [end]


def test_where_no_boot_is_known_the_instance_counts_as_lost() -> None:
    assert ends(replace(LIFE, boot_id=""), boot_id="") == [End.LOST]


@pytest.mark.parametrize("step", [9, 10])
def test_a_preempted_life_whose_last_step_is_durable_was_rescued(step: int) -> None:
    assert ends(replace(LIFE, outcome=lives.PREEMPTED, step=step)) == [End.RESCUED]


@pytest.mark.parametrize("durable", [None, str(CheckpointName(1, 9)), "no name"])
def test_a_preempted_life_whose_last_step_is_not_durable_was_lost(durable: str | None) -> None:
    assert ends(replace(LIFE, outcome=lives.PREEMPTED, newest_durable=durable)) == [End.LOST]


@pytest.mark.parametrize(
    ("outcome", "end"),
    [
        (lives.DIED, End.CRASHED),
        (lives.FAILED, End.CRASHED),
        (lives.COMPLETED, End.QUIET),
        (lives.STOPPED, End.QUIET),
        (lives.FENCED, End.QUIET),
    ],
)
def test_a_life_that_ended_in_the_open_ended_so_wherever_the_next_one_runs(outcome: str, end: End) -> None:
    life = replace(LIFE, outcome=outcome)
    assert [end_of(life), end_of(life, "boot", "i-1"), end_of(life, "another", "i-2")] == [end] * 3


def test_each_life_is_judged_by_the_place_of_the_one_right_after_it() -> None:
    second = replace(LIFE, incarnation=2, boot_id="second", instance="i-2")
    third = replace(LIFE, incarnation=3, boot_id="second", instance="i-2")
    assert ends(LIFE, second, third) == [End.LOST, End.CRASHED, End.LOST]


# -- how long it lived -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heartbeat", [0.0, 1001.0, 1000.0 + DAY], ids=["set back", "one second on", "slept a day"])
def test_how_long_a_life_lived_does_not_depend_on_a_clock_that_is_set(heartbeat: float) -> None:
    (span,) = spans_of([replace(LIFE, heartbeat=heartbeat)], **HERE)
    assert (span.duration_s, span.began_s) == (601.5, 90.0)


@pytest.mark.parametrize(("heartbeat", "lived_s"), [(1600.0, 600.0), (0.0, 0.0), (1e300, 366 * DAY)])
def test_without_such_a_clock_the_heartbeat_counts_within_reason(heartbeat: float, lived_s: float) -> None:
    assert replace(LIFE, lived_s=None, heartbeat=heartbeat).duration_s == lived_s


@pytest.mark.parametrize(("said", "bounded"), [(-1e9, 0.0), (1e300, 366 * DAY), (0.0, 0.0)])
def test_a_life_that_no_life_can_have_lived_is_bounded(said: float, bounded: float) -> None:
    assert replace(LIFE, lived_s=said).duration_s == bounded


def test_a_life_cannot_begin_before_its_instance() -> None:
    (span,) = spans_of([replace(LIFE, began_s=-1e9)], **HERE)
    assert span.began_s == 0.0


def test_lives_whose_clocks_lie_leave_sums_that_can_be() -> None:
    absurd = [replace(LIFE, began_s=began, lived_s=lived) for began in (-1e300, 1e300) for lived in (-1e300, 1e300)]
    evidence = Evidence.of(spans_of(absurd, **HERE))
    assert all(0.0 <= hours < 1e6 for hours in evidence.exposure_h)


# -- the record --------------------------------------------------------------------------------------------------


def test_a_record_says_what_the_life_said(local: PosixTier) -> None:
    history = [LIFE, replace(LIFE, incarnation=2, lived_s=None, cadence=None, newest_durable=None)]
    for life in history:
        local.replace(layout.life(life.incarnation), life.to_json())
    assert read_lives(local) == history


WRONG: list[tuple[str, Any]] = [
    ("instance", 5),
    ("instance", None),
    ("pool", None),
    ("pool", ["aws"]),
    ("began_s", "90"),
    ("began_s", None),
    ("began_s", float("nan")),
    ("began_s", float("inf")),
    ("lived_s", "600"),
    ("lived_s", ""),
    ("lived_s", []),
    ("lived_s", {}),
    ("lived_s", float("nan")),
    ("lived_s", 10**400),
    ("cadence", []),
    ("cadence", "every minute"),
    ("cadence", 0),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}={value!r:.8}" for name, value in WRONG])
def test_a_record_of_other_types_is_left_out_with_one_line(
    local: PosixTier, caplog: pytest.LogCaptureFixture, name: str, value: Any
) -> None:
    local.replace(layout.life(1), json.dumps({**asdict(LIFE), name: value}).encode())
    local.replace(layout.life(2), replace(LIFE, incarnation=2).to_json())
    with caplog.at_level(logging.WARNING, logger="spot_core"):
        assert [life.incarnation for life in read_lives(local)] == [2]
    (record,) = caplog.records
    assert layout.life(1) in record.getMessage()
