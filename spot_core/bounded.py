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
    answer = _begin(operation)
    if not wait([answer], seconds).done:
        raise NoAnswer(f"no answer within {seconds:g} s")
    return answer.result()


def in_order(operations: Iterable[Callable[[], _T]], slots: threading.Semaphore) -> Generator[_T, None, None]:
    """What the operations return, in their order. To be closed.

    Each has one of `slots` from before it is asked for until its result has been used: those who share them have no
    more under way together. Raises what the first one that fails raises. Those under way then, or when it is closed,
    are left to their threads.
    """
    remaining, is_more = iter(operations), True
    coming: deque[Future[_T]] = deque()
    held = 0
    try:
        while is_more or coming:
            # Who has something under way does not wait for a slot: others may wait for those that it holds.
            while is_more and slots.acquire(blocking=not coming):
                held += 1
                operation = next(remaining, None)
                if operation is not None:
                    coming.append(_begin(operation))
                    continue
                is_more = False
                slots.release()
                held -= 1
            if coming:
                yield coming.popleft().result()
                slots.release()
                held -= 1
    finally:
        for _ in range(held):
            slots.release()


def _begin(operation: Callable[[], _T]) -> Future[_T]:
    answer: Future[_T] = Future()

    def work() -> None:
        try:
            answer.set_result(operation())
        except BaseException as error:
            answer.set_exception(error)

    # A thread of a pool would be waited for when the process ends.
    threading.Thread(target=work, name="bounded", daemon=True).start()
    return answer
