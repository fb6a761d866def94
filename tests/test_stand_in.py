"""What stands in for a training thread that hangs leaves one alone that gets on."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from spot_core import stand_in
from spot_core.notice.signals import SignalWatcher
from spot_core.stand_in import StandIn


def test_short_rests_between_steps_are_no_rest_and_a_long_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in, "_EVERY_S", 0.01)
    monkeypatch.setattr(stand_in, "_LONG_S", 3600.0)
    acted: list[Any] = []
    has_acted = threading.Event()

    def act(capture: Any) -> None:
        acted.append(capture)
        has_acted.set()

    substitute = StandIn(act, SignalWatcher(), may_exit=False)
    substitute.start()
    for step in range(50):
        substitute.rests(lambda step=step: step)  # type: ignore[misc,arg-type,return-value]
        time.sleep(0.005)
        substitute.moves()
    assert not acted
    monkeypatch.setattr(stand_in, "_LONG_S", 0.0)
    substitute.rests(lambda: 50)  # type: ignore[arg-type,return-value]
    assert has_acted.wait(30)
    assert acted[0]() == 50
    substitute.close()
