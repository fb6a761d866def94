"""Storage that never answers must not keep anybody waiting: it may take many minutes to give up by itself."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, wait
from typing import TypeVar

_T = TypeVar("_T")


class NoAnswer(Exception):
    """It took too long. What was asked for may still happen."""


def within(seconds: float, operation: Callable[[], _T]) -> _T:
    """What `operation` returns or raises; NoAnswer if it does neither in time. It is left to a thread then."""
    answer = begin(operation)
    if not wait([answer], seconds).done:
        raise NoAnswer(f"no answer within {seconds:g} s")
    return answer.result()


class _Slot:
    """One of a semaphore's, given back once."""

    def __init__(self, slots: threading.Semaphore) -> None:
        self._slots, self._is_given_back = slots, threading.Lock()

    def give_back(self, *_: object) -> None:
        if self._is_given_back.acquire(blocking=False):
            self._slots.release()


def in_order(
    operations: Iterable[Callable[[], _T]], slots: threading.Semaphore, *, are_results_large: bool = True
) -> Generator[_T, None, None]:
    """What the operations return, in their order. To be closed.

    Each has one of `slots` from before it is asked for until its result has been used, or is there where it takes no
    room: those who share them have no more under way together. Raises what the first one that fails raises. Those under
    way then, or when it is closed, are left to their threads.
    """
    remaining, is_more = iter(operations), True
    coming: deque[tuple[Future[_T], _Slot]] = deque()

    def may_begin() -> bool:
        """Takes a slot for the next one, unless a result is there to be used, or will be sooner."""
        if are_results_large:
            # Who holds slots for results does not wait for another: others may wait for those.
            return slots.acquire(blocking=not coming)
        return not (coming and coming[0][0].done()) and slots.acquire()

    try:
        while is_more or coming:
            while is_more and may_begin():
                slot, operation = _Slot(slots), None
                try:
                    operation = next(remaining, None)
                finally:
                    if operation is None:
                        is_more = False
                        slot.give_back()
                if operation is not None:
                    coming.append((begin(operation), slot))
                    if not are_results_large:
                        coming[-1][0].add_done_callback(slot.give_back)
            if coming:
                yield coming[0][0].result()
                coming.popleft()[1].give_back()
    finally:
        for _, slot in coming:
            slot.give_back()


def begin(operation: Callable[[], _T]) -> Future[_T]:
    """Have `operation` done in a thread of its own, which nothing waits for when the process ends."""
    answer: Future[_T] = Future()

    def work() -> None:
        try:
            answer.set_result(operation())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, name="bounded", daemon=True).start()
    return answer
