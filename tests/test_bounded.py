"""Threads that nobody waits for: bounded in time, a few at once, and gone with the process."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial

import pytest

from spot_core.bounded import NoAnswer, in_order, within


def test_results_come_in_order_however_long_each_takes() -> None:
    """The first operation ends last: it waits for the third."""
    third_is_done = threading.Event()

    def operation(number: int) -> int:
        if number == 0:
            assert third_is_done.wait(60)
        if number == 2:
            third_is_done.set()
        return number

    assert list(in_order((partial(operation, number) for number in range(7)), at_once=3)) == list(range(7))


def test_no_more_are_begun_than_may_be_under_way() -> None:
    begun: list[int] = []

    def operations() -> list[Callable[[], None]]:
        return [partial(begun.append, number) for number in range(10)]

    results = in_order(iter(operations()), at_once=3)
    next(results)
    assert len(begun) <= 4
    results.close()
    assert len(begun) <= 4


def test_the_first_failure_ends_it() -> None:
    def fails() -> int:
        raise ValueError("second")

    results = in_order(iter([lambda: 1, fails, lambda: 3]), at_once=2)
    assert next(results) == 1
    with pytest.raises(ValueError, match="second"):
        next(results)


def test_what_does_not_answer_is_left_alone() -> None:
    never = threading.Event()
    with pytest.raises(NoAnswer, match=r"0\.01 s"):
        within(0.01, never.wait)
    never.set()


def test_an_operation_may_itself_time_out() -> None:
    def times_out() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        within(60, times_out)


@pytest.mark.parametrize("way", ["next(in_order(iter([int, never.wait]), at_once=2))", "within(0.01, never.wait)"])
def test_a_process_ends_without_waiting_for_them(way: str) -> None:
    script = (
        "import threading\nfrom contextlib import suppress\nfrom spot_core.bounded import NoAnswer, in_order, within\n"
        f"never = threading.Event()\nwith suppress(NoAnswer):\n    {way}\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
