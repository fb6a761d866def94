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


def in_order(operations: Iterable[Callable[[], _T]], *, at_once: int) -> Generator[_T, None, None]:
    """What the operations return, in their order, so many of them under way also while one is used. To be closed.

    Raises what the first one that fails raises. Those under way then, or when it is closed, are left to their threads.
    """
    coming: deque[Future[_T]] = deque()
    for operation in operations:
        found = [coming.popleft().result()] if len(coming) == at_once else []
        coming.append(_begin(operation))
        yield from found
    while coming:
        yield coming.popleft().result()


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
