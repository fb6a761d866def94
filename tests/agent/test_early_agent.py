"""An agent that is started before the trainer knows what to ask it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from spot_core.agent import launch
from spot_core.agent.client import AgentClient, stored_loggers
from spot_core.agent.launch import AgentProcess, EarlyAgent, start_early
from spot_core.config import SpotConfig
from spot_core.errors import ConfigError, TierError
from spot_core.store.identity import RunIdentity
from tests.agent.place import Place
from tests.agent.processes import eventually
from tests.faultproxy import FaultProxy
from tests.servers import S3Server, free_port
from tests.trees import tree

IDENTITY = RunIdentity("testing", {})


@pytest.fixture(autouse=True)
def nobody_waits() -> Iterator[None]:
    launch._waiting.end()
    yield
    launch._waiting.end()


def _config(place: Place, **more: Any) -> SpotConfig:
    return SpotConfig.resolve({**place.options(), **more}, fallback_local=".")


def _in_memory(place: Place, **more: Any) -> SpotConfig:
    """A place whose file system has to be loaded, but not found."""
    return _config(place, remote="memory://bucket/run", **more)


def _waiting() -> AgentProcess | None:
    return launch._waiting._process


def _end(client: AgentClient) -> None:
    assert client._process is not None
    client._process.kill()
    client._process.wait()


def test_an_agent_that_was_started_early_opens_the_run(place: Place) -> None:
    with EarlyAgent(_config(place)) as early:
        process = early._process
        assert process is not None
        client = AgentClient(_config(place), IDENTITY, early)
        assert client.open().incarnation == 1
        assert client._process is process and early.take() is None
    assert process.poll() is None
    _end(client)


def test_an_agent_that_was_killed_before_it_was_asked_is_started_again(place: Place) -> None:
    with EarlyAgent(_config(place)) as early:
        process = early._process
        assert process is not None
        process.kill()
        process.wait()
        client = AgentClient(_config(place), IDENTITY, early)
        assert client.open().incarnation == 1
        assert client._process is not None and client._process is not process
    _end(client)


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


# -- before it is known that anything will be trained ----------------------------------------------------------


def test_what_was_started_first_is_taken_by_whoever_asks_first(place: Place) -> None:
    start_early(_in_memory(place))
    process = _waiting()
    start_early(_in_memory(place, keep_local=3))
    assert process is not None and _waiting() is process, "one is enough"
    with EarlyAgent(_in_memory(place)) as early:
        assert early._process is process and _waiting() is None
        client = AgentClient(_in_memory(place), IDENTITY, early)
        assert client.open().incarnation == 1
    _end(client)


def test_one_that_died_is_not_waited_for(place: Place) -> None:
    start_early(_in_memory(place))
    process = _waiting()
    assert process is not None
    process.kill()
    process.wait()
    with EarlyAgent(_in_memory(place)) as early:
        assert early._process is not None and early._process is not process


def test_one_that_loaded_something_else_gives_way(place: Place) -> None:
    start_early(_in_memory(place))
    process = _waiting()
    start_early(_in_memory(place, fleet="s3://bucket/fleet"))
    assert process is not None and process.poll() is not None
    assert _waiting() is not None and _waiting() is not process


def test_nothing_is_started_where_nothing_has_to_be_loaded(place: Place) -> None:
    start_early(_config(place))
    start_early(_config(place, remote=f"file://{place.folder}/bucket/run"))
    assert _waiting() is None


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"])
def test_only_the_first_of_several_ranks_starts_one(place: Place, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    start_early(_in_memory(place))
    assert _waiting() is None
    monkeypatch.setenv(name, "0")
    start_early(_in_memory(place))
    assert _waiting() is not None


@pytest.mark.parametrize("end", ["raise SystemExit(3)", "os.kill(os.getpid(), 9)", "os._exit(4)"])
def test_one_that_nobody_asks_ends_with_its_process(place: Place, end: str, tmp_path: Path) -> None:
    script = f"""
        import os
        from spot_core.agent import launch
        from spot_core.config import SpotConfig
        launch.start_early(SpotConfig.resolve({_in_memory_options(place)!r}, fallback_local="."))
        print(launch._waiting._process.pid, flush=True)
        {end}
    """
    result = _run(script)
    assert result.returncode in {3, 4, -9} and not result.stderr, result.stderr
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(result.stdout)).wait(60)
    assert tree(tmp_path) == {}


def test_a_fork_leaves_it_to_its_owner(place: Place) -> None:
    script = f"""
        import os
        from spot_core.agent import launch
        from spot_core.config import SpotConfig
        config = SpotConfig.resolve({_in_memory_options(place)!r}, fallback_local=".")
        launch.start_early(config)
        process = launch._waiting._process
        if (child := os.fork()) == 0:
            with launch.EarlyAgent(config) as early:
                is_another = early._process.pid != process.pid
            launch._waiting.end()
            os._exit(0 if is_another else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert process.poll() is None and launch.start(config) is process
        launch.end(process)
    """
    result = _run(script)
    assert result.returncode == 0, result.stderr


def _in_memory_options(place: Place) -> dict[str, Any]:
    return {**place.options(), "remote": "memory://bucket/run"}


def _run(script: str) -> subprocess.CompletedProcess[str]:
    # Warnings are shown: a process that is forgotten is one.
    command = [sys.executable, "-Wdefault::ResourceWarning", "-c", textwrap.dedent(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_one_that_told_the_trackers_ids_opens_the_run(place: Place) -> None:
    assert stored_loggers(_config(place)) == {}
    process = _waiting()
    assert process is not None and process.poll() is None
    with EarlyAgent(_config(place)) as early:
        assert early._process is process
        client = AgentClient(_config(place), IDENTITY, early)
        assert client.open().incarnation == 1
    _end(client)


# -- what it does until it is asked ----------------------------------------------------------------------------


def _on_s3(place: Place, proxy: FaultProxy, bucket: str, **more: Any) -> SpotConfig:
    return _config(place, remote=f"s3://{bucket}/run", **{"storage_options": proxy.options, **more})


def test_it_connects_while_a_base_is_read_and_writes_nothing(
    place: Place, s3_server: S3Server, proxy: FaultProxy
) -> None:
    config = _on_s3(place, proxy, s3_server.new_bucket())
    with EarlyAgent(config) as early:
        eventually(lambda: any("/run/run.json" in request.path for request in proxy.seen), "it has connected")
        assert {request.method for request in proxy.seen} == {"GET"}
        client = AgentClient(config, IDENTITY, early)
        assert client.open().incarnation == 1
    _end(client)


def _is_prepared() -> bool:
    """Whether the one that waits has a file system: those of object stores have a thread."""
    process = _waiting()
    assert process is not None
    return psutil.Process(process.pid).num_threads() > 1


def test_it_asks_the_store_nothing_before_anything_is_trained(
    place: Place, s3_server: S3Server, proxy: FaultProxy
) -> None:
    config = _on_s3(place, proxy, s3_server.new_bucket())
    start_early(config)
    eventually(_is_prepared, "it has opened the place")
    assert proxy.seen == []
    with EarlyAgent(config) as early:
        client = AgentClient(config, IDENTITY, early)
        assert client.open().incarnation == 1
    _end(client)


def test_what_was_prepared_for_another_place_is_not_used(place: Place, s3_server: S3Server, proxy: FaultProxy) -> None:
    buckets = [s3_server.new_bucket() for _ in range(2)]
    start_early(_on_s3(place, proxy, buckets[0]))
    eventually(_is_prepared, "it has opened the place")
    config = _on_s3(place, proxy, buckets[1])
    with EarlyAgent(config) as early:
        client = AgentClient(config, IDENTITY, early)
        assert client.open().incarnation == 1
    _end(client)
    assert proxy.seen and all(buckets[1] in request.path for request in proxy.seen)


def test_what_is_wrong_is_told_when_the_run_is_opened(place: Place, proxy: FaultProxy) -> None:
    """The bucket is missing, nobody answers, the scheme is unknown."""
    nobody = {**proxy.options, "endpoint_url": f"http://127.0.0.1:{free_port()}"}
    wrong = [
        (_on_s3(place, proxy, "no-such-bucket"), TierError, "bucket does not exist"),
        (
            _on_s3(place, proxy, "bucket", storage_options=nobody, start_timeout_s=1.0),
            TierError,
            "could not be reached",
        ),
        (_config(place, remote="no-such-scheme://bucket/run"), ConfigError, "no-such-scheme"),
    ]
    for config, kind, told in wrong:
        start_early(config)
        with EarlyAgent(config) as early, pytest.raises(kind, match=told):
            AgentClient(config, IDENTITY, early).open()
        assert tree(place.folder) == {}


def test_it_gets_the_environment_as_it_is_when_it_is_asked(
    place: Place, s3_server: S3Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "nobody-knows-it")
    options = {name: value for name, value in proxy.options.items() if name not in {"key", "secret"}}
    config = _on_s3(place, proxy, s3_server.new_bucket(), storage_options=options)
    start_early(config)
    eventually(_is_prepared, "it has looked for credentials in the old one")
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", proxy.options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", proxy.options["secret"])
    monkeypatch.setenv("FSSPEC_S3_REQUESTER_PAYS", "true")
    with EarlyAgent(config) as early:
        client = AgentClient(config, IDENTITY, early)
        assert client.open().incarnation == 1
    _end(client)
    for request in proxy.seen:
        assert f"Credential={proxy.options['key']}/" in request.headers["authorization"]
        assert request.headers["x-amz-request-payer"] == "requester"
