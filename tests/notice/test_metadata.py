"""What a metadata service must not do to those who ask it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from spot_core.notice.metadata import ask
from tests.metadata import AwsServer, Fault


@pytest.fixture
def aws() -> Iterator[AwsServer]:
    with AwsServer() as server:
        yield server


def until_s() -> float:
    return time.monotonic() + 30.0


def test_a_body_that_is_too_large_is_refused(aws: AwsServer) -> None:
    aws.fault = Fault.IS_HUGE
    with pytest.raises(OSError, match="answers with more than"):
        ask(f"http://{aws.host}/", headers={}, until_s=until_s())


def test_a_refusal_is_an_answer(aws: AwsServer) -> None:
    assert ask(f"http://{aws.host}/", headers={}, until_s=until_s()).status == 401


@pytest.mark.parametrize("fault", [Fault.RESETS, Fault.IS_NO_HTTP])
def test_what_is_no_answer_is_an_oserror(aws: AwsServer, fault: Fault) -> None:
    aws.fault = fault
    with pytest.raises(OSError):  # noqa: PT011
        ask(f"http://{aws.host}/", headers={}, until_s=until_s())


@pytest.mark.parametrize("address", ["ftp://{}/", "{}/", "http:///", "http://[", "http://{}9999999/", "http://{}/a b"])
def test_an_address_that_is_none_is_not_asked(aws: AwsServer, address: str) -> None:
    with pytest.raises(OSError):  # noqa: PT011
        ask(address.format(aws.host), headers={}, until_s=until_s())
    assert not aws.requests


def test_when_the_time_is_over_nothing_is_asked(aws: AwsServer) -> None:
    with pytest.raises(TimeoutError):
        ask(f"http://{aws.host}/", headers={}, until_s=time.monotonic())
    assert not aws.requests
