"""The rebalance recommendation: where there is one, it is seen; what goes wrong on the way is no recommendation."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from spot_core.notice.instance import Instance
from spot_core.notice.rebalance import RebalanceHint
from tests.metadata import AwsServer, Fault

SPOT = Instance(id="i-1", boot_id="b", booted=0.0, provider="aws", is_spot=True)
NOTICE = {"noticeTime": "2026-11-20T09:00:00Z"}
NOTICED_UNIX_S = 1_795_165_200.0


@pytest.fixture
def aws() -> Iterator[AwsServer]:
    with AwsServer() as server:
        yield server


@pytest.fixture
def hint(aws: AwsServer) -> RebalanceHint:
    hint = RebalanceHint.for_instance(SPOT, aws.environ)
    assert hint is not None
    return hint


def test_a_recommendation_is_seen_when_it_comes(aws: AwsServer, hint: RebalanceHint) -> None:
    assert hint.noticed_unix_s() is None
    aws.documents[aws.rebalance] = NOTICE
    assert hint.noticed_unix_s() == NOTICED_UNIX_S


def test_a_recommendation_stands_once_it_was_made(aws: AwsServer, hint: RebalanceHint) -> None:
    aws.documents[aws.rebalance] = NOTICE
    hint.noticed_unix_s()
    del aws.documents[aws.rebalance]
    assert hint.noticed_unix_s() == NOTICED_UNIX_S


def test_one_token_serves_many_questions(aws: AwsServer, hint: RebalanceHint) -> None:
    for _ in range(3):
        hint.noticed_unix_s()
    assert aws.paths == ["/latest/api/token", *[aws.rebalance] * 3]


def test_a_token_that_has_run_out_is_renewed_at_once(aws: AwsServer, hint: RebalanceHint) -> None:
    hint.noticed_unix_s()
    aws.tokens.clear()
    aws.documents[aws.rebalance] = NOTICE
    assert hint.noticed_unix_s() == NOTICED_UNIX_S


@pytest.mark.parametrize("fault", Fault)
def test_trouble_is_no_recommendation_and_passes(aws: AwsServer, hint: RebalanceHint, fault: Fault) -> None:
    hint.noticed_unix_s()
    aws.documents[aws.rebalance] = NOTICE
    aws.fault = fault
    assert hint.noticed_unix_s() is None
    aws.fault = None
    assert hint.noticed_unix_s() == NOTICED_UNIX_S


@pytest.mark.parametrize("noticed", [None, 5, "soon", "2026-13-01T00:00:00Z", ["2026-11-20T09:00:00Z"]])
def test_a_time_that_is_none_is_no_recommendation(aws: AwsServer, hint: RebalanceHint, noticed: object) -> None:
    aws.documents[aws.rebalance] = {"noticeTime": noticed}
    assert hint.noticed_unix_s() is None


def test_an_answer_without_a_time_is_no_recommendation(aws: AwsServer, hint: RebalanceHint) -> None:
    aws.documents[aws.rebalance] = {}
    assert hint.noticed_unix_s() is None


def test_the_time_is_utc_wherever_the_instance_is(
    aws: AwsServer, hint: RebalanceHint, monkeypatch: pytest.MonkeyPatch
) -> None:
    aws.documents[aws.rebalance] = NOTICE
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        noticed = hint.noticed_unix_s()
    time.tzset()
    assert noticed == NOTICED_UNIX_S


def test_that_nothing_is_recommended_is_no_trouble(hint: RebalanceHint, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="spot_core"):
        hint.noticed_unix_s()
    assert not caplog.records


def test_without_a_token_nothing_is_asked(aws: AwsServer, hint: RebalanceHint) -> None:
    aws.fault = Fault.BROKEN
    assert hint.noticed_unix_s() is None
    assert aws.paths == ["/latest/api/token"]


def test_who_has_no_such_service_is_not_asked(aws: AwsServer) -> None:
    off = {**aws.environ, "AWS_EC2_METADATA_DISABLED": "true"}
    assert RebalanceHint.for_instance(SPOT, off) is None
    for other in (replace(SPOT, is_spot=False), replace(SPOT, provider="gcp"), replace(SPOT, provider="")):
        assert RebalanceHint.for_instance(other, aws.environ) is None
    assert RebalanceHint.for_instance(replace(SPOT, is_spot=None), aws.environ) is not None
