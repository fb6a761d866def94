"""What a notice calls for at a boundary: in numbers first, then over a whole announced end."""

from __future__ import annotations

import logging
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spot_core.cadence.interval import MARGIN_S
from spot_core.emergency import Action, EmergencyPath, decide
from spot_core.notice.notice import Notice


@pytest.mark.parametrize(
    ("left_s", "is_copied", "is_durable", "expected"),
    [
        (100.0, False, False, Action.COPY),
        (100.0, True, False, Action.TRAIN),
        (100.0, True, True, Action.TRAIN),
        (10.5, False, False, Action.LEAVE),
        (10.5, True, True, Action.LEAVE),
        (10.5, True, False, Action.HOLD),
        (9.9, True, True, Action.LEAVE),
        (8.9, True, True, Action.HOLD),
        (9.9, False, False, Action.TRAIN),
        (-1.0, True, True, Action.HOLD),
    ],
    ids=str,
)
def test_what_is_done_with_a_checkpoint_of_10_s_and_steps_of_1_s(
    left_s: float, is_copied: bool, is_durable: bool, expected: Action
) -> None:
    assert decide(left_s, rescue_s=10.0, step_s=1.0, is_copied=is_copied, is_durable=is_durable) is expected


@given(
    lead_s=st.floats(0.0, 300.0),
    rescue_s=st.floats(0.01, 100.0),
    step_s=st.floats(0.01, 50.0),
    upload_s=st.floats(0.0, 150.0),
)
def test_nothing_is_begun_that_cannot_be_durable_in_time_and_what_is_left_unused_is_short(
    lead_s: float, rescue_s: float, step_s: float, upload_s: float
) -> None:
    """Steps of one length until the end. upload_s: what the safe copy really takes."""
    now, copied_at, ended_at = 0.0, None, None
    while now < lead_s and ended_at is None:
        is_durable = copied_at is not None and now >= copied_at + upload_s
        action = decide(
            lead_s - now, rescue_s=rescue_s, step_s=step_s, is_copied=copied_at is not None, is_durable=is_durable
        )
        if action in {Action.COPY, Action.LEAVE}:
            assert now + rescue_s - MARGIN_S / 2 <= lead_s
        if action is Action.COPY:
            assert copied_at is None
            copied_at = now
        if action in {Action.LEAVE, Action.HOLD}:
            ended_at = now
        now += step_s
    if ended_at is not None:
        assert ended_at + step_s + rescue_s >= lead_s, "it left although another step would have fitted"


class Boundaries:
    """A path that is asked at each boundary, with a checkpoint that takes 3 s and steps of 0.1 s."""

    def __init__(self, grace_s: float = 25.0) -> None:
        self.path = EmergencyPath(grace_s)
        self.asked = 0

    def at(self, notice: Notice | None, signalled_at: float | None = None, *, is_durable: bool = True) -> Action:
        def costs() -> tuple[float, float]:
            self.asked += 1
            return 3.0, 0.1

        return self.path.at_boundary(notice, signalled_at, costs=costs, is_durable=lambda step: is_durable)


@pytest.fixture
def boundaries() -> Boundaries:
    return Boundaries()


def in_s(lead_s: float, source: str = "aws") -> Notice:
    now = time.time()
    return Notice(source, now + lead_s, now)


def test_nothing_is_asked_while_nothing_is_announced(boundaries: Boundaries) -> None:
    assert [boundaries.at(None) for _ in range(3)] == [Action.NONE] * 3
    assert boundaries.asked == 0


def test_a_long_notice_is_told_once_copied_and_trained_through(
    boundaries: Boundaries, caplog: pytest.LogCaptureFixture
) -> None:
    notice = in_s(100.0)
    assert boundaries.at(notice) is Action.COPY
    boundaries.path.copied(7)
    assert [boundaries.at(notice) for _ in range(3)] == [Action.TRAIN] * 3
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "aws takes this instance in 100 s, and a checkpoint takes 3.0 s: saving now, and once more" in caplog.text


def test_a_notice_that_is_withdrawn_leaves_nothing_and_a_new_one_begins_anew(
    boundaries: Boundaries, caplog: pytest.LogCaptureFixture
) -> None:
    assert boundaries.at(in_s(100.0)) is Action.COPY
    boundaries.path.copied(7)
    assert boundaries.at(None) is Action.NONE
    assert "aws withdrew its notice: training goes on as usual" in caplog.text
    assert boundaries.path.deadline is None
    assert boundaries.at(in_s(100.0)) is Action.COPY


def test_an_end_that_is_moved_keeps_the_copy_that_was_taken(
    boundaries: Boundaries, caplog: pytest.LogCaptureFixture
) -> None:
    """Azure's events lose their date when they start, and the machine goes at once."""
    assert boundaries.at(in_s(100.0, "azure")) is Action.COPY
    boundaries.path.copied(7)
    assert boundaries.at(in_s(2.0, "azure")) is Action.HOLD
    assert "the end comes in 2 s now, says azure" in caplog.text
    assert not [record for record in caplog.records if record.levelno == logging.ERROR]


def test_a_notice_too_short_for_one_checkpoint_says_how_much_is_missing(
    boundaries: Boundaries, caplog: pytest.LogCaptureFixture
) -> None:
    notice = in_s(1.0)
    assert [boundaries.at(notice) for _ in range(3)] == [Action.TRAIN] * 3
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "2.0 s too many. The checkpoint before stands" in record.getMessage()


def test_a_signal_is_answered_at_once_whatever_else_is_announced(boundaries: Boundaries) -> None:
    signalled_at = time.monotonic()
    assert boundaries.at(None, signalled_at) is Action.LEAVE
    assert boundaries.path.deadline == signalled_at + 25.0
    notice = in_s(10.0, "gcp")
    assert boundaries.at(notice, signalled_at) is Action.LEAVE
    assert boundaries.path.deadline == pytest.approx(time.monotonic() + 10.0, abs=1.0)


def test_an_end_that_does_not_come_is_over_after_a_minute(
    boundaries: Boundaries, caplog: pytest.LogCaptureFixture
) -> None:
    notice = in_s(-61.0)
    boundaries.path.copied(7)
    assert [boundaries.at(notice) for _ in range(2)] == [Action.NONE] * 2
    assert caplog.text.count("did not come") == 1
    assert boundaries.at(in_s(100.0)) is Action.COPY
