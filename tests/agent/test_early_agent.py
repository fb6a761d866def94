"""An agent that is started before the trainer knows what to ask it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from spot_core.agent.client import AgentClient, EarlyAgent
from spot_core.config import SpotConfig
from spot_core.store.identity import RunIdentity
from tests.agent.place import Place
from tests.trees import tree


def _config(place: Place, **more: Any) -> SpotConfig:
    return SpotConfig.resolve({**place.options(), **more}, fallback_local=".")


def test_an_agent_that_was_started_early_opens_the_run(place: Place) -> None:
    with EarlyAgent(_config(place)) as early:
        process = early._process
        assert process is not None
        client = AgentClient(_config(place), RunIdentity("testing", {}), early)
        assert client.open().incarnation == 1
        assert client._process is process and early.take() is None
    assert process.poll() is None
    process.kill()
    process.wait()


def test_an_agent_that_was_killed_before_it_was_asked_is_started_again(place: Place) -> None:
    with EarlyAgent(_config(place)) as early:
        process = early._process
        assert process is not None
        process.kill()
        process.wait()
        client = AgentClient(_config(place), RunIdentity("testing", {}), early)
        assert client.open().incarnation == 1
        assert client._process is not None and client._process is not process
    client._process.kill()
    client._process.wait()


@pytest.mark.parametrize("is_told", [True, False])
def test_an_agent_that_is_asked_for_nothing_ends_and_leaves_nothing(place: Place, is_told: bool) -> None:
    """is_told: by the end of its block; otherwise the trainer is gone."""
    early = EarlyAgent(_config(place))
    process = early._process
    assert process is not None and process.stdin is not None
    if is_told:
        early.__exit__()
    else:
        process.stdin.close()
        assert process.wait(60) == 0
    assert process.poll() is not None
    assert tree(place.folder) == {}


@pytest.mark.parametrize("scheme", ["s3", "memory", "no-such-scheme"])
def test_an_early_agent_loads_the_file_system_it_will_need(scheme: str) -> None:
    script = f"import sys\nfrom spot_core.store.tier import preload\npreload({scheme!r})\nprint('s3fs' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == [str(scheme == "s3")], result.stderr
