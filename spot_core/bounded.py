"""Storage that never answers must not keep anybody waiting: it may take many minutes to give up by itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")


class NoAnswer(Exception):
    """It took too long. What was asked for may still happen."""


def within(seconds: float, operation: Callable[[], _T]) -> _T:
    """What `operation` returns or raises; NoAnswer if it does neither in time. It is left to a thread then."""
    answer: Future[_T] = Future()

    def work() -> None:
        try:
            answer.set_result(operation())
        except BaseException as error:
            answer.set_exception(error)

    # A thread of a pool would be waited for when the process ends.
    worker = threading.Thread(target=work, name="bounded", daemon=True)
    worker.start()
    worker.join(seconds)
    if not answer.done():
        raise NoAnswer(f"no answer within {seconds:g} s")
    return answer.result()
