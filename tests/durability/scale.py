"""How often the durability tests try: a few times in `make test`, many times in `make test-deep`."""

from __future__ import annotations

import os

IS_DEEP = os.environ.get("SPOT_TEST_DEEP") == "1"


def times(quick: int, deep: int) -> int:
    """How often to try here: `quick` in `make test`, `deep` in `make test-deep`."""
    return deep if IS_DEEP else quick
