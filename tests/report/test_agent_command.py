"""`spot agent`: what is committed locally gets to the remote by hand, or the reason is said."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spot_core.errors import CommitUnknownError, ConfigError, SpotError, TierDeniedError, TierError
from spot_core.report.draining import HandDrain, open_drain
from spot_core.store import catalog, incarnation, layout, resume
from spot_core.store.posix import PosixTier
from spot_core.store.tier import OnBytes
from tests.report.conftest import Spot, everything_in, spot_process, start_spot
from tests.report.stored import BuiltRun

_PATIENCE_S = 60.0


def _once(run: BuiltRun, *more: object) -> tuple[object, ...]:
    return ("agent", "--local", run.local.root, "--remote", run.url, "--once", *more)


def _watching(run: BuiltRun) -> HandDrain:
    return open_drain(run.local.root, run.url, {}, keep_local=None, keep_remote=None)


def _wait_for(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)


def test_once_makes_everything_durable_and_says_so(two_tiers: BuiltRun) -> None:
    run = two_tiers
    names = [run.commit(1), run.commit(2)]
    run.complete(names[1])

    result = spot_process(*_once(run))

    assert result.code == 0, result.err
    assert catalog.names(run.remote) == sorted(names, reverse=True)
    assert list(catalog.completions(run.remote)) == [names[1]]
    for name in names:
        resume.verify(run.remote, catalog.read_manifest(run.remote, name))
        assert f"checkpoint {name} is durable in {run.url}" in result.err


def test_once_keeps_milestones_on_the_remote(two_tiers: BuiltRun) -> None:
    run = two_tiers
    names = [run.commit(step) for step in (95, 105, 130, 140)]
    result = spot_process(*_once(run, "--keep-remote", 1, "--keep-local", 1, "--keep-every", 100))
    assert result.code == 0, result.err
    assert catalog.names(run.remote) == [names[3], names[1]]
    assert catalog.names(run.local) == [names[3]]


def test_once_with_everything_drained_says_that_nothing_is_left(two_tiers: BuiltRun) -> None:
    name = two_tiers.commit(1)
    two_tiers.drain()
    result = spot_process(*_once(two_tiers))
    assert result.code == 0
    assert f"nothing left to drain, newest durable checkpoint: {name}" in result.err


def test_a_folder_without_a_run_is_a_wrong_call(spot: Spot, two_tiers: BuiltRun, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = spot("agent", "--local", tmp_path / "empty", "--remote", two_tiers.url, "--once")
    assert result.code == 2
    assert "holds no run to drain" in result.err


def test_the_folder_above_serves_as_local_too(spot: Spot, two_tiers: BuiltRun) -> None:
    name = two_tiers.commit(1)
    code = spot("agent", "--local", two_tiers.local.root.parent, "--remote", two_tiers.url, "--once").code
    assert code == 0
    assert catalog.names(two_tiers.remote) == [name]


def test_a_newer_life_elsewhere_ends_with_4_and_nothing_is_written(
    spot: Spot, two_tiers: BuiltRun, tmp_path: Path
) -> None:
    run = two_tiers
    run.commit(1)
    incarnation.claim(PosixTier(tmp_path / "elsewhere"), run.remote, time.time())
    before = everything_in(Path(run.url))

    result = spot(*_once(run))

    assert result.code == 4
    assert "incarnation 2 of this run exists" in result.err
    assert everything_in(Path(run.url)) == before


def test_a_newer_life_elsewhere_is_said_although_nothing_is_left_to_drain(
    spot: Spot, two_tiers: BuiltRun, tmp_path: Path
) -> None:
    two_tiers.commit(1)
    two_tiers.drain()
    incarnation.claim(PosixTier(tmp_path / "elsewhere"), two_tiers.remote, time.time())
    assert spot(*_once(two_tiers)).code == 4


def test_another_run_is_refused(spot: Spot, two_tiers: BuiltRun, tmp_path: Path) -> None:
    two_tiers.commit(1)
    other = BuiltRun(tmp_path / "other" / "alpaca")
    before = everything_in(other.local.root)
    result = spot("agent", "--local", two_tiers.local.root, "--remote", other.url, "--once")
    assert result.code == 2
    assert "belongs to another run" in result.err
    assert everything_in(other.local.root) == before


def test_one_folder_cannot_be_both_tiers(spot: Spot, run: BuiltRun) -> None:
    run.commit(1)
    result = spot("agent", "--local", run.url, "--remote", run.url, "--once", "--keep-local", 1)
    assert result.code == 2
    assert "both the local folder and the remote" in result.err


def test_a_damaged_local_checkpoint_is_named_and_the_others_are_drained(spot: Spot, two_tiers: BuiltRun) -> None:
    sound, bad = two_tiers.commit(1), two_tiers.commit(2)
    two_tiers.file(bad, "optimizer.pt").write_bytes(b"torn")

    result = spot(*_once(two_tiers))

    assert result.code == 1
    assert f"{bad} is damaged and was not drained" in result.err
    assert catalog.names(two_tiers.remote) == [sound]


def test_without_being_told_how_many_to_keep_nothing_is_deleted(spot: Spot, two_tiers: BuiltRun) -> None:
    names = [two_tiers.commit(step) for step in range(1, 6)]
    assert spot(*_once(two_tiers)).code == 0
    for tier in (two_tiers.local, two_tiers.remote):
        assert catalog.names(tier) == sorted(names, reverse=True)


def test_both_tiers_are_pruned_to_what_is_to_be_kept(spot: Spot, two_tiers: BuiltRun) -> None:
    names = [two_tiers.commit(step) for step in range(1, 6)]
    two_tiers.drain()
    last = two_tiers.commit(6)
    assert spot(*_once(two_tiers, "--keep-local", 1, "--keep-remote", 3)).code == 0
    assert catalog.names(two_tiers.local) == [last]
    assert catalog.names(two_tiers.remote) == [last, names[4], names[3]]


def test_the_environment_of_the_training_sets_what_is_kept(
    spot: Spot, two_tiers: BuiltRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPOT_KEEP_LOCAL", "1")
    monkeypatch.setenv("SPOT_KEEP_REMOTE", "2")
    _, middle = two_tiers.commit(1), two_tiers.commit(2)
    two_tiers.drain()
    last = two_tiers.commit(3)
    assert spot(*_once(two_tiers)).code == 0
    assert catalog.names(two_tiers.local) == [last]
    assert catalog.names(two_tiers.remote) == [last, middle]


def test_a_watching_agent_drains_new_commits_and_leaves_on_sigterm_after_one_last_pass(two_tiers: BuiltRun) -> None:
    run = two_tiers
    first = run.commit(1)
    process = start_spot("agent", "--local", run.local.root, "--remote", run.url)
    try:
        _wait_for(lambda: catalog.names(run.remote) == [first])
        second = run.commit(2)
        _wait_for(lambda: catalog.names(run.remote) == [second, first])
        third = run.commit(3)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=_PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert catalog.names(run.remote) == [third, second, first]


def test_a_watching_agent_waits_for_its_run_to_begin(tmp_path: Path) -> None:
    local, remote = tmp_path / "nvme" / "alpaca", tmp_path / "bucket" / "alpaca"
    drain = open_drain(local, str(remote), {}, keep_local=None, keep_remote=None)
    stop = threading.Event()
    thread = threading.Thread(target=drain.watch, args=(stop,), daemon=True)
    thread.start()
    run = BuiltRun(local, PosixTier(remote))
    name = run.commit(1)
    stop.set()
    thread.join(_PATIENCE_S)
    assert not thread.is_alive()
    assert catalog.names(run.remote) == [name]


def test_a_watching_agent_retries_a_remote_that_does_not_answer_and_warns_once(
    two_tiers: BuiltRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name, upload = two_tiers.commit(1), PosixTier.upload
    failures: list[SpotError] = [CommitUnknownError("no reply"), TierError("unreachable"), TierError("unreachable")]

    def flaky(tier: PosixTier, source: Path, path: str, on_bytes: OnBytes) -> None:
        if failures and path.endswith("optimizer.pt"):
            raise failures.pop()
        upload(tier, source, path, on_bytes)

    class Impatient(threading.Event):
        """Does not wait, and is set once the checkpoint is there."""

        def wait(self, timeout: float | None = None) -> bool:
            if catalog.names(two_tiers.remote) == [name]:
                self.set()
            return self.is_set()

    monkeypatch.setattr(PosixTier, "upload", flaky)
    with caplog.at_level(logging.WARNING):
        _watching(two_tiers).watch(Impatient())
    assert catalog.names(two_tiers.remote) == [name]
    assert [record.message for record in caplog.records] == [
        "drain failed and is retried: unreachable",
        "drain failed and is retried: no reply",
    ]


def test_a_watching_agent_does_not_retry_a_refusal(two_tiers: BuiltRun, monkeypatch: pytest.MonkeyPatch) -> None:
    two_tiers.commit(1)

    def refuse(*_: object) -> None:
        raise TierDeniedError("no permission")

    monkeypatch.setattr(PosixTier, "upload", refuse)
    with pytest.raises(TierDeniedError):
        _watching(two_tiers).watch(threading.Event())


def test_a_watching_agent_follows_the_next_life_on_this_host(two_tiers: BuiltRun) -> None:
    """Without that the second life's claim would fence the agent that is there to serve it."""
    run, stopped = two_tiers, threading.Event()
    stopped.set()
    drain = _watching(run)
    first = run.commit(1)
    drain.watch(stopped)
    run.claim()
    second = run.commit(2)
    drain.watch(stopped)
    assert catalog.names(run.remote) == [second, first]


def test_a_remote_that_was_emptied_is_not_filled_again_by_itself(two_tiers: BuiltRun) -> None:
    two_tiers.commit(1)
    Path(two_tiers.url, layout.RUN).unlink()
    with pytest.raises(ConfigError, match="the remote holds no run yet"):
        _watching(two_tiers).once()
