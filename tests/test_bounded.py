"""Threads that nobody waits for: bounded in time, a few at once, and gone with the process."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Semaphore

import pytest

from spot_core.bounded import NoAnswer, in_order, within


# Of results that take no room, the others go on with the slots that a slow one leaves them; else no further than those.
@pytest.mark.parametrize(("slots", "are_results_large", "frees"), [(3, True, 2), (2, False, 6)])
def test_results_come_in_order_however_long_each_takes(slots: int, are_results_large: bool, frees: int) -> None:
    """The first operation ends last: it waits for a later one."""
    other_is_done = threading.Event()

    def operation(number: int) -> int:
        if number == 0:
            assert other_is_done.wait(60)
        if number == frees:
            other_is_done.set()
        return number

    operations = (partial(operation, number) for number in range(7))
    assert list(in_order(operations, Semaphore(slots), are_results_large=are_results_large)) == list(range(7))


def test_results_that_take_no_room_are_told_before_all_are_begun() -> None:
    told: list[int] = []

    def operations() -> Iterator[Callable[[], int]]:
        for number in range(20):
            if number == 10:
                assert told, "who waits for the end is told of what is done"
            yield partial(int, number)

    for number in in_order(operations(), Semaphore(1), are_results_large=False):
        told.append(number)
    assert told == list(range(20))


def test_no_more_are_begun_than_may_be_under_way() -> None:
    begun: list[int] = []

    def operations() -> list[Callable[[], None]]:
        return [partial(begun.append, number) for number in range(10)]

    results = in_order(iter(operations()), Semaphore(3))
    next(results)
    assert len(begun) <= 3
    results.close()
    assert len(begun) <= 3


@pytest.mark.parametrize("are_results_large", [True, False])
def test_those_who_share_slots_have_no_more_under_way_together_and_all_get_on(are_results_large: bool) -> None:
    """Each holds some while it waits for its first result: one that waited for a slot then would wait for ever."""
    slots, lock, most, under_way = Semaphore(3), threading.Lock(), 0, 0

    def begin(count: int) -> None:
        nonlocal under_way, most
        with lock:
            under_way += count
            most = max(most, under_way)

    def work(number: int) -> int:
        begin(0 if are_results_large else -1)
        return number

    def use(sharer: int) -> list[int]:
        def operations() -> Iterator[Callable[[], int]]:
            for number in range(50):
                begin(1)
                yield partial(work, number)

        found = []
        for number in in_order(operations(), slots, are_results_large=are_results_large):
            found.append(number)
            begin(-1 if are_results_large else 0)
        return found

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(use, range(4), timeout=60)) == [list(range(50))] * 4
    assert 1 < most <= 3
    assert all(slots.acquire(blocking=False) for _ in range(3)) and not slots.acquire(blocking=False)


@pytest.mark.parametrize("are_results_large", [True, False])
@pytest.mark.parametrize("ends", ["closed", "an operation fails", "what comes next fails"])
def test_slots_are_given_back_however_it_ends(ends: str, are_results_large: bool) -> None:
    slots, never = Semaphore(3), threading.Event()

    def operations() -> Iterator[Callable[[], object]]:
        yield int
        yield never.wait if ends == "closed" else partial(int, "none")
        if ends == "what comes next fails":
            raise ValueError("next")
        yield never.wait

    results = in_order(operations(), slots, are_results_large=are_results_large)
    if ends == "closed":
        next(results)
        results.close()
    else:
        with pytest.raises(ValueError, match=r"next|invalid literal"):
            list(results)
    assert all(slots.acquire(blocking=False) for _ in range(3)) and not slots.acquire(blocking=False)
    never.set()


def test_the_first_failure_ends_it() -> None:
    def fails() -> int:
        raise ValueError("second")

    results = in_order(iter([lambda: 1, fails, lambda: 3]), Semaphore(2))
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


@pytest.mark.parametrize("way", ["next(in_order(iter([int, never.wait]), Semaphore(2)))", "within(0.01, never.wait)"])
def test_a_process_ends_without_waiting_for_them(way: str) -> None:
    script = (
        "import threading\nfrom contextlib import suppress\nfrom threading import Semaphore\n"
        "from spot_core.bounded import NoAnswer, in_order, within\n"
        f"never = threading.Event()\nwith suppress(NoAnswer):\n    {way}\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
