"""Fixtures of the store's tests."""

from __future__ import annotations

import pytest

from spot_core.store import incarnation


@pytest.fixture
def never_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine's claim would be given up for its lateness, which is another test's matter."""
    monkeypatch.setattr(incarnation, "SETTLE_S", 3600.0)
