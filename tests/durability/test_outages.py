"""Whole training lives over a bad network to a real server: they end as if the network had been good.

Time is scaled by 60: an outage of ten minutes and an interval of one minute become 10 s and 1 s. What is not scaled is
what rides the outage out: the retries of the S3 client, half a minute, and the agent's pauses behind them. The deep
version lasts longer than the former, so that the agent gives up, counts, tells and tries again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spot_core.agent import lives
from spot_core.agent.journal import Journal
from spot_core.store import catalog, layout
from spot_core.store.layout import CheckpointName
from tests.durability.job import JobSpec, share_held
from tests.durability.runs import Run
from tests.durability.scale import times
from tests.faultproxy import HANG, LOST_REPLY, SLOW_DOWN, UNREACHABLE, Fault, FaultProxy, Request
from tests.lives.lives import Life, uninterrupted, wait_for
from tests.servers import S3Server

SHORT, LONG = 9, times(45, 180)  # epochs of ten steps, some 35 ms each
OUTAGE_S = times(10, 40)
UPLINK_BYTES_S = 50e3
EARLIER_LIVES = 40
MOST_HELD = 0.3  # of the time: snapshots every 0.3 s on a busy machine, and no network

Chooses = Callable[[Request], Fault | None]


def spec_of(folder: Path, epochs: int, **more: Any) -> JobSpec:
    return JobSpec(folder=str(folder / "job"), arguments={"num_train_epochs": epochs}, **more)


def reference_of(folder: Path, epochs: int, **more: Any) -> JobSpec:
    reference = uninterrupted(spec_of(folder, epochs, **more), folder / "job")
    assert isinstance(reference, JobSpec)
    return reference


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    return reference_of(tmp_path_factory.mktemp("short"), SHORT)


def distant_run(
    folder: Path, reference: JobSpec, server: S3Server, proxy: FaultProxy, *, read_timeout_s: float = 20, **more: Any
) -> Run:
    """The same training, draining through the bad network; the run's own view of the remote is undisturbed."""
    storage = proxy.options
    storage["config_kwargs"] = {**storage["config_kwargs"], "read_timeout": read_timeout_s}
    options = {
        "remote": f"s3://{server.new_bucket()}/team/job",
        "local": str(folder / "job" / "local"),
        "storage_options": storage,
        **more.pop("options", {}),
    }
    spec = dataclasses.replace(reference, folder=str(folder / "job"), has_callback=True, options=options, **more)
    return Run(spec, server.options)


def assert_trained_undisturbed(run: Run) -> None:
    """What held up training is no multiple of what it costs to take snapshots: nothing waited for the network."""
    assert share_held(run.spec) < MOST_HELD


# -- faults of single requests ---------------------------------------------------------------------------------


def a_fifth_fails(draw: random.Random) -> Chooses:
    faults = [SLOW_DOWN, UNREACHABLE, HANG, Fault(status=500), Fault(status=503, code="ServiceUnavailable")]
    return lambda _: draw.choice(faults) if draw.random() < 0.2 else None


def resets_in_mid_body(draw: random.Random) -> Chooses:
    def chooses(request: Request) -> Fault | None:
        if not request.is_data or draw.random() > 0.4:
            return None
        return Fault(reset_body_after_bytes=200) if request.method == "PUT" else Fault(reset_after_bytes=200)

    return chooses


def replies_are_lost(draw: random.Random) -> Chooses:
    return lambda request: LOST_REPLY if request.method != "GET" and draw.random() < 0.4 else None


@pytest.mark.parametrize("network", [a_fifth_fails, resets_in_mid_body, replies_are_lost])
def test_two_lives_on_two_instances_over_a_bad_network_end_bit_equal(
    network: Callable[[random.Random], Chooses], tmp_path: Path, short: JobSpec, s3_server: S3Server, proxy: FaultProxy
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    run = distant_run(tmp_path, short, s3_server, proxy, read_timeout_s=1, interval_s=0.3)
    proxy.chooses = network(random.Random(seed))
    first = Life(dataclasses.replace(run.spec, dies=f"step:{SHORT * 7}"))
    first.result()
    run.settle()
    assert run.durable is not None, "the agent drains what the killed trainer left"
    run.lose_instance()
    expected = f"resume: step {run.durable.step} from the remote tier"
    assert expected in run.finish(short).log
    print(f"{len(proxy.fired)} of {len(proxy.seen)} requests spoiled")
    assert len(proxy.fired) > len(proxy.seen) / 20
    assert_trained_undisturbed(run)


def test_throttling_for_a_while_is_waited_out(
    tmp_path: Path, short: JobSpec, s3_server: S3Server, proxy: FaultProxy
) -> None:
    run = distant_run(tmp_path, short, s3_server, proxy, interval_s=0.3)
    life = Life(run.spec)
    wait_for(lambda: catalog.names(run.remote))
    until = time.monotonic() + 5.0
    proxy.chooses = lambda _: SLOW_DOWN if time.monotonic() < until else None
    run.assert_finished(life.result(), short)
    assert proxy.fired
    assert len(proxy.fired) < 200, "it backs off"
    assert_trained_undisturbed(run)


def test_credentials_that_expire_in_mid_run_are_renewed(
    tmp_path: Path, short: JobSpec, lenient_server: S3Server
) -> None:
    credentials = tmp_path / "credentials"
    variables = {
        "AWS_SHARED_CREDENTIALS_FILE": str(credentials),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_PROFILE": "default",
        "AWS_ACCESS_KEY_ID": "",  # an empty one is passed over, one of this machine would win
    }
    write_credentials(credentials, "old")
    with FaultProxy(lenient_server.port) as proxy:
        run = distant_run(tmp_path, short, lenient_server, proxy, interval_s=0.3, variables=variables)
        for name in ("key", "secret"):
            del run.spec.options["storage_options"][name]
        life = Life(run.spec)
        wait_for(lambda: catalog.names(run.remote))
        write_credentials(credentials, "new")
        expired = Fault(status=400, code="ExpiredToken")
        proxy.chooses = lambda request: expired if "Credential=old/" in request.headers["authorization"] else None
        result = life.result()
        run.assert_finished(result, short)
        assert proxy.fired
        assert "drain failed" not in result.log
        assert_trained_undisturbed(run)


def write_credentials(path: Path, name: str) -> None:
    path.write_text(f"[default]\naws_access_key_id = {name}\naws_secret_access_key = secret-{name}\n")


# -- an outage, a slow uplink ------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
def test_an_outage_leaves_a_backlog_that_drains_newest_first(
    tmp_path: Path, s3_server: S3Server, proxy: FaultProxy
) -> None:
    reference = reference_of(tmp_path / "reference", LONG)
    run = distant_run(tmp_path, reference, s3_server, proxy, interval_s=1.0, options={"keep_remote": 100})
    life = Life(run.spec)
    wait_for(lambda: len(catalog.names(run.remote)) >= 2)
    began, step = time.monotonic(), step_of(run)
    proxy.chooses = lambda _: UNREACHABLE
    wait_for(lambda: len(undrained(run)) > OUTAGE_S / 4, timeout_s=60.0)
    shown = status_of(run)
    assert len(shown["undrained"]) > OUTAGE_S / 4 and shown["gap_steps"] > 0 and shown["gap_s"] > 0
    time.sleep(max(0.0, began + OUTAGE_S - time.monotonic()))
    assert step_of(run) - step > OUTAGE_S, "training goes on"
    shown, backlog, index = status_of(run), undrained(run), len(proxy.seen)
    print(f"{len(backlog)} checkpoints wait, {shown['gap_steps']} steps, {shown['agent']['failures']} failures")
    proxy.chooses = lambda _: None
    run.assert_finished(life.result(), reference)
    drained = [name for name in manifests_put(proxy.seen[index:]) if name in backlog]
    # The upload that the outage cut off is ended first; what is durable by then needs no other place in the queue.
    behind = drained[1:] if drained[0] != backlog[0] else drained
    assert len(behind) >= len(backlog) - 1
    assert behind == sorted(behind, reverse=True), drained
    shown = status_of(run)
    assert (shown["undrained"], shown["gap_steps"], shown["agent"]["last_failure"]) == ([], 0, None)
    assert_trained_undisturbed(run)


@pytest.mark.timeout(900)
def test_a_slow_uplink_lengthens_the_interval_and_nothing_piles_up(
    tmp_path: Path, s3_server: S3Server, proxy: FaultProxy
) -> None:
    reference = reference_of(tmp_path / "reference", LONG, kind="full")
    run = distant_run(tmp_path, reference, s3_server, proxy, interval_s=None)
    preempt_often(run)
    proxy.uplink_bytes_s = UPLINK_BYTES_S
    life = Life(run.spec)
    waiting = 0
    while not Path(run.spec.folder, "final.pt").exists():
        waiting = max(waiting, len(undrained(run)))
        time.sleep(0.2)
    result = life.result()
    run.assert_finished(result, reference)
    journal = Journal(run.local.root, EARLIER_LIVES + 1)
    agent, progress = journal.read_status(), journal.read_progress()
    assert agent is not None and progress is not None
    uploads = list(agent.drained.values())
    commits = result.log.count("checkpoint: step")
    print(f"{commits} commits in {progress.useful_s:.1f} s, {waiting} waited at most, uploads took {uploads} s")
    # Until the first upload has ended, which tells its length, each interval is half of what the oldest has waited. The
    # last commit is the end of training.
    before_known = 2 + math.log(uploads[0], 1.5)
    assert commits <= 1 + before_known + progress.useful_s / min(uploads)
    assert waiting <= before_known
    assert_trained_undisturbed(run)


def preempt_often(run: Run) -> None:
    """Records of earlier lives, so that the hazard asks for checkpoints more often than the uplink allows."""
    for number in range(1, EARLIER_LIVES + 1):
        life = lives.Life(
            incarnation=number, host="host", boot_id="boot", started=0.0, heartbeat=5.0, outcome=lives.DIED
        )
        run.remote.create(layout.incarnation(number), b"{}")
        run.remote.create(layout.life(number), life.to_json())


def undrained(run: Run) -> list[CheckpointName]:
    """Local commits newer than what is durable, newest first."""
    durable = max(catalog.names(run.remote), default=CheckpointName(0, 0))
    return [name for name in catalog.names(run.local) if name > durable]


def step_of(run: Run) -> int:
    progress = Journal(run.local.root, 1).read_progress()
    assert progress is not None
    return progress.step


def status_of(run: Run) -> dict[str, Any]:
    """What `spot status` says of the local folder, asked from where the remote can be reached."""
    shown = run.spot("status", run.remote.url, "--local", run.local.root, "--json")
    local: dict[str, Any] = json.loads(shown)["local"]
    return local


def manifests_put(requests: list[Request]) -> list[CheckpointName]:
    """In order of their first attempt."""
    entries = [
        request.path.partition("?")[0].rpartition("/")[2]
        for request in requests
        if request.method == "PUT" and f"/{layout.MANIFESTS}/" in request.path
    ]
    return [name for entry in dict.fromkeys(entries) if (name := layout.committed(entry)) is not None]
