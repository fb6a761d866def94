"""Storage that never answers must not keep anybody waiting."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


class NoAnswer(Exception):
    """It took too long. What was asked for may still happen."""


def within(seconds: float, operation: Callable[[], _T]) -> _T:
    """What `operation` returns or raises; NoAnswer if it does neither in time. It is left to a thread then."""
    results: queue.SimpleQueue[tuple[list[_T], BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put(([operation()], None))
        except BaseException as error:
            results.put(([], error))

    threading.Thread(target=work, name="doctor", daemon=True).start()
    try:
        found, error = results.get(timeout=seconds)
    except queue.Empty:
        raise NoAnswer(f"no answer within {seconds:.0f} s") from None
    if error is not None:
        raise error
    return found[0]
