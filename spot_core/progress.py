"""The progress bar over bytes, on standard error: restores, the final drain, and what the command line reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from spot_core.store.resume import OnProgress


@contextlib.contextmanager
def byte_bar(what: str, *, is_in_logs: bool = False) -> Iterator[OnProgress]:
    """The block calls what it is given with bytes done and bytes in total; the bar appears with the first call.

    is_in_logs: also where standard error is not a terminal, and it stays; else it vanishes when done.
    """
    bar: tqdm[Any] | None = None

    def on_progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(
                desc=f"spot: {what}",
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                leave=is_in_logs,
                disable=False if is_in_logs else None,  # None: on terminals only
            )
        bar.total = total
        bar.update(done - bar.n)

    try:
        yield on_progress
    finally:
        if bar is not None:
            bar.close()
