"""The interpreter's cyclic garbage collector, held back where it only costs time."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """No collection while what is made is there to stay: a model's parts by name, a checkpoint that is loaded.

    So many new objects bring about a full one, which visits those of all libraries too, of transformers and torch
    alone a million: a quarter of a second, and it finds nothing. One that is due comes afterwards. A process that is
    forked meanwhile would keep to it: no loader's worker may start inside.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
